"""A collection against servers that do everything wrong: each prompt gets its own answer, once."""

import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat_server import (
    HANG,
    ChatServer,
    Reply,
    answer_to,
    completion,
    cut,
    echo,
    error,
    prompt_of,
    serve,
)
from collecting import chats, recipe
from gad_fast.errors import TeacherError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collect import Collection, collect
from gad_fast.teacher.estimate import estimate
from gad_fast.teacher.rejections import Rejections

COUNT = 12


def answers(path: Path) -> dict[str, str]:
    """By prompt, what the cache holds."""
    with TeacherCache.open(path, read_only=True) as cache:
        return {row.request.messages[-1]["content"]: row.response.text for row in cache}


def own_answers(count: int) -> dict[str, str]:
    return {f"q {index}": answer_to(f"q {index}") for index in range(count)}


def stream(text: str, *, is_whole: bool = True) -> Reply:
    """The same answer in pieces, as server-sent events."""
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": letter} for letter in text)]
    events: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    if is_whole:
        events.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        events.append({**head, "choices": [], "usage": usage})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return Reply(body="".join(lines).encode(), content_type="text/event-stream")


# What goes wrong with the first attempts at a prompt; the third is answered.
KINDS = {"hang": "timeout", "slow drip": "timeout", "cut body": "cut", "cut connection": "cut"}
FAULTS: dict[str, Reply | None] = {
    "429 without retry-after": error(429),
    "429 with retry-after": error(429, Retry_After="0.01"),
    "500": error(500),
    "502 of a proxy": Reply(502, b"<html>bad gateway</html>", content_type="text/html"),
    "408": error(408),
    "hang": HANG,
    "invalid JSON": Reply(body=b'{"choices": [', content_type="application/json"),
    "wrong content type": Reply(body=b"<html>hello</html>", content_type="text/html"),
    "JSON of another kind": Reply(body={"hello": "world"}),
    "no choice": Reply(body={**completion("x"), "choices": []}),
    "empty body": Reply(body=b""),
    "slow drip": Reply(body=completion("x"), drip_seconds=0.05),
    "cut body": Reply(body=completion("x"), sent_bytes=20),
    "cut connection": Reply(body=completion("x"), sent_bytes=0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_asked_again(name: str, tmp_path: Path) -> None:
    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply | None:
        return FAULTS[name] if attempt <= 2 else echo(server, body, attempt)

    with serve(script) as server:
        settings = {"timeout_seconds": 0.3 if name in ("hang", "slow drip") else 10.0}
        result = collect(recipe(tmp_path, server, teacher=settings), chats(COUNT))
        assert result.tally.num_new == COUNT
        kind = KINDS.get(name, name.split()[0] if name[0].isdigit() else "malformed")
        assert result.tally.failures == {kind: 2 * COUNT}
        assert set(server.attempts.values()) == {3}
    assert answers(tmp_path / "teacher.cache") == own_answers(COUNT)


def test_a_server_that_is_down_is_given_up_and_left_for_the_next_start(tmp_path: Path) -> None:
    with serve() as server:
        url = server.url
    retry = {"max_attempts": 2, "first_wait_seconds": 0.001}
    plan = recipe(tmp_path, url, retry=retry)
    result = collect(plan, chats(3))
    assert (result.tally.num_given_up, result.tally.num_left) == (3, 3)
    assert result.tally.failures == {"no connection": 6}
    assert "3 are left; the same command asks for them" in str(result)


def test_a_second_answer_on_a_connection_is_nobodys(tmp_path: Path) -> None:
    def twice(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        reply = echo(server, body, attempt)
        reply.times = 2
        return reply

    with serve(twice) as server:
        collect(recipe(tmp_path, server, teacher={"concurrency": 1}), chats(COUNT))
    assert answers(tmp_path / "teacher.cache") == own_answers(COUNT)


def test_retry_after_holds_back_every_request_to_the_teacher(tmp_path: Path) -> None:
    moments: list[float] = []

    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        moments.append(time.monotonic())
        if len(moments) == 1:
            return error(429, Retry_After="0.4")
        return echo(server, body, attempt)

    with serve(script) as server:
        collect(recipe(tmp_path, server, teacher={"concurrency": 1}), chats(3))
    assert moments[1] - moments[0] >= 0.4
    assert len(moments) == 4


def test_a_date_in_retry_after_is_waited_for(tmp_path: Path) -> None:
    wish = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now

    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        return error(503, Retry_After=wish) if attempt == 1 else echo(server, body, attempt)

    started = time.monotonic()
    with serve(script) as server:
        assert collect(recipe(tmp_path, server), chats(1)).tally.num_new == 1
    assert time.monotonic() - started >= 0.9


def refuse_some(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
    if prompt_of(body) in ("q 1", "q 5"):
        return error(400, "this prompt is\ntoo bad")
    return echo(server, body, attempt)


def test_what_will_never_succeed_is_recorded_and_not_asked_again(tmp_path: Path) -> None:
    with serve(refuse_some) as server:
        plan = recipe(tmp_path, server)
        first = collect(plan, chats(COUNT))
        assert (first.tally.num_new, first.tally.num_rejected) == (COUNT - 2, 2)
        again = collect(plan, chats(COUNT))
        assert (again.tally.num_kept, again.tally.num_rejected_before) == (COUNT - 2, 2)
        assert again.tally.num_left == 0
        assert set(server.attempts.values()) == {1}
        rows = [json.loads(line) for line in first.rejected.read_text().splitlines() if line]
        assert all("this prompt is too bad" in row["reason"] for row in rows)
        # The file is the user's to delete.
        first.rejected.unlink()
        collect(plan, chats(COUNT))
        assert server.attempts["q 1"] == server.attempts["q 5"] == 2


def test_a_torn_line_of_the_rejections_hides_no_other(tmp_path: Path) -> None:
    with serve(refuse_some) as server:
        rejected = collect(recipe(tmp_path, server), chats(2)).rejected
        rejected.write_text(rejected.read_text() + '\n{"key": "torn')
        collect(recipe(tmp_path, server), chats(COUNT))
    assert len(Rejections(tmp_path / "teacher.cache")) == 2


def test_too_many_rejections_stop_the_run_and_keep_what_came(tmp_path: Path) -> None:
    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        is_even = int(prompt_of(body).split()[1]) % 2 == 0
        return echo(server, body, attempt) if is_even else error(422, "no such field")

    with serve(script) as server:
        plan = recipe(tmp_path, server, retry={"min_judged": 10, "max_failed_share": 0.3})
        with pytest.raises(TeacherError, match=r"of \d+ requests failed.*422: .*no such field"):
            collect(plan, chats(200))
        assert len(server.bodies) <= 10 + 4 + 4
    kept = answers(tmp_path / "teacher.cache")
    assert 4 <= len(kept) <= 9


@pytest.mark.parametrize("status", [401, 404])
def test_no_access_stops_at_once_and_rejects_nothing(status: int, tmp_path: Path) -> None:
    with serve(lambda *_: error(status, "you may not")) as server:
        with pytest.raises(TeacherError, match=f"cannot ask teachers.a .{status}.*you may not"):
            collect(recipe(tmp_path, server), chats(COUNT))
        assert len(server.bodies) <= 4
    assert len(Rejections(tmp_path / "teacher.cache")) == 0


def test_streamed_answers_are_put_together_and_a_torn_one_is_asked_again(tmp_path: Path) -> None:
    def script(_: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        assert body["stream"] is True
        reply = stream(answer_to(prompt_of(body)), is_whole=attempt > 1)
        if attempt == 2:
            reply.sent_bytes = 300
        return reply

    with serve(script) as server:
        result = collect(recipe(tmp_path, server, teacher={"stream": True}), chats(COUNT))
    assert answers(tmp_path / "teacher.cache") == own_answers(COUNT)
    assert result.tally.failures.total() == 2 * COUNT
    assert result.tally.used.tokens == 7 * COUNT


def test_flags_are_stored_with_the_response(tmp_path: Path) -> None:
    replies = {
        "q 0": completion("", finish_reason="stop"),
        "q 1": completion("and then", finish_reason="length"),
        "q 2": completion("x" * 50),
        "q 3": completion("x", message={"role": "assistant", "refusal": "No.", "content": None}),
        "q 4": completion("fine"),
    }
    with serve(lambda _, body, __: Reply(body=replies[prompt_of(body)])) as server:
        result = collect(recipe(tmp_path, server, long_response_tokens=40), chats(5))
    with TeacherCache.open(tmp_path / "teacher.cache", read_only=True) as cache:
        flags = {row.request.messages[0]["content"]: row.response.flags for row in cache}
    assert flags == {
        "q 0": ("empty",),
        "q 1": ("truncated",),
        "q 2": ("long",),
        "q 3": ("refusal",),
        "q 4": (),
    }
    assert result.tally.flags == {"empty": 1, "truncated": 1, "long": 1, "refusal": 1}


def test_a_request_is_what_the_recipe_says(tmp_path: Path) -> None:
    settings = {
        "system_prompt": "Be brief.",
        "temperature": 0.5,
        "max_tokens": 9,
        "extra": {"reasoning": {"effort": "low"}},
    }
    with serve() as server:
        collect(recipe(tmp_path, server, teacher=settings, responses_per_prompt=3), chats(2))
    expected = {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q 0"},
        ],
        "temperature": 0.5,
        "max_tokens": 9,
        "reasoning": {"effort": "low"},
    }
    assert [body for body in server.bodies if prompt_of(body) == "q 0"] == [expected] * 3


def test_several_teachers_are_asked_in_one_go(tmp_path: Path) -> None:
    with serve() as one, serve() as two:
        teachers = {
            "one": {"model": "m1", "base_url": one.url, "weight": 3.0},
            "two": {"model": "m2", "base_url": two.url, "stream": False},
        }
        result = collect(recipe(tmp_path, one, teachers=teachers), chats(60))
        assert result.tally.num_new == 60
        assert {body["model"] for body in one.bodies} == {"m1"}
        assert len(one.bodies) + len(two.bodies) == 60
        assert 33 <= len(one.bodies) <= 57  # 45 expected, 3.5 standard deviations


BUDGETS = {"requests": 7, "tokens": 7 * 19 + 400, "cost": (7 * 19 + 400) / 1e6}


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_budget_ends_the_run_before_it_is_passed_also_over_starts(
    kind: str, tmp_path: Path
) -> None:
    settings = {"max_tokens": 20, "prompt_price": 1.0, "response_price": 1.0}
    with serve() as server:
        plan = recipe(tmp_path, server, teacher=settings, budget={kind: BUDGETS[kind]})
        first = collect(plan, chats(100))
        assert first.stopped == "the budget is used up"
        used = spent(tmp_path / "teacher.cache")
        assert used[kind] <= BUDGETS[kind]
        # What is left would not hold the longest possible answer.
        assert used[kind] > BUDGETS[kind] - {"requests": 1, "tokens": 110, "cost": 110e-6}[kind]
        again = collect(plan, chats(100))
        assert again.tally.num_new == 0
        assert again.stopped == "the budget is used up"


def spent(path: Path) -> dict[str, float]:
    with TeacherCache.open(path, read_only=True) as cache:
        rows = [row.response for row in cache]
    tokens = sum((row.num_prompt_tokens or 0) + (row.num_response_tokens or 0) for row in rows)
    return {"requests": len(rows), "tokens": tokens, "cost": sum(row.cost or 0 for row in rows)}


def test_an_estimate_comes_from_a_sample_that_is_kept(tmp_path: Path) -> None:
    settings = {"prompt_price": 1.0, "response_price": 1.0, "requests_per_minute": 60_000.0}
    with serve() as server:
        plan = recipe(tmp_path, server, teacher=settings, estimate_prompts=10)
        result = estimate(plan, chats(100))
        assert result.sample.tally.num_new == len(server.bodies) == 10
        (told,) = result.teachers
        assert (told.num_sampled, told.num_requests) == (10, 90)
        # 10 tokens of prompt and about 10 of "about q 17".
        assert told.tokens == pytest.approx(90 * 20, rel=0.05)
        assert told.cost == pytest.approx((told.tokens or 0) / 1e6)
        assert (told.seconds or 0) >= 90 / 1000
        assert collect(plan, chats(100)).tally.num_new == 90
        assert set(server.attempts.values()) == {1}


def test_concurrency_is_kept(tmp_path: Path) -> None:
    with serve() as server:
        collect(recipe(tmp_path, server, teacher={"concurrency": 3}), chats(60))
        assert server.most_open <= 3


def test_cut_connections_cost_no_answer(tmp_path: Path) -> None:
    faults: Iterator[int] = iter(range(10**6))

    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        return cut(server, body, attempt) if next(faults) % 3 else echo(server, body, attempt)

    with serve(script) as server:
        plan = recipe(tmp_path, server, retry={"max_attempts": 50, "first_wait_seconds": 0.001})
        result: Collection = collect(plan, chats(40))
    assert result.tally.num_new == 40
    assert answers(tmp_path / "teacher.cache") == own_answers(40)
