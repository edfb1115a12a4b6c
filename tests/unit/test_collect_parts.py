"""The parts of a collection: limits, budget, who is asked, what a failure means, flags."""

import asyncio
import email.utils
import itertools
import time
from collections import Counter
from typing import Any

import httpx2
import openai
import pytest

import virtual_time
from collecting import chats
from gad_fast.config import BudgetSettings, CollectRecipe, TeacherSettings
from gad_fast.records import Message
from gad_fast.teacher.budget import Budget, Usage, most_of, used_by
from gad_fast.teacher.control import Control
from gad_fast.teacher.failures import failure_of, retry_after_seconds
from gad_fast.teacher.limits import Limits
from gad_fast.teacher.questions import questions, with_system_prompt
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.teacher.remarks import flags_of


def teacher(**settings: Any) -> TeacherSettings:
    return TeacherSettings(model="m", **settings)


def moments(limits: Limits, sizes: list[int]) -> list[float]:
    """When requests of these sizes are admitted, in seconds."""

    async def admit_all() -> list[float]:
        loop = asyncio.get_running_loop()

        async def admit(size: int) -> float:
            await limits.admit(size)
            return loop.time()

        return await asyncio.gather(*map(admit, sizes))

    return virtual_time.run(admit_all())


def test_requests_are_spread_over_the_minute() -> None:
    times = sorted(moments(Limits(teacher(requests_per_minute=120)), [1] * 121))
    # Two at once, then one every half second: 120 in any minute.
    assert times[1] == pytest.approx(0, abs=0.01)
    assert times[-1] == pytest.approx(119 / 2, rel=0.02)
    assert all(b - a == pytest.approx(0.5, abs=0.02) for a, b in itertools.pairwise(times[1:]))


def test_less_than_one_request_a_second_is_possible() -> None:
    times = sorted(moments(Limits(teacher(requests_per_minute=6)), [1] * 4))
    assert times == pytest.approx([0, 10, 20, 30], abs=0.1)


def test_tokens_are_spread_even_where_one_request_has_more_than_a_second_holds() -> None:
    times = sorted(moments(Limits(teacher(tokens_per_minute=6000)), [1000] * 4))
    assert times[-1] == pytest.approx((4000 - 100) / 100, rel=0.03)


def test_a_pause_admits_nobody() -> None:
    async def wait() -> float:
        limits = Limits(teacher())
        limits.pause(7.0)
        limits.pause(3.0)
        await limits.admit(1)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(wait()) == pytest.approx(7.0, abs=0.01)


def test_a_budget_is_used_up_but_never_passed() -> None:
    async def spend() -> Usage:
        budget = Budget(BudgetSettings(tokens=1000), Usage(tokens=100))
        most = Usage(1, tokens=150)

        async def one(number: int) -> bool:
            if not await budget.reserve(most):
                return False
            await asyncio.sleep(number)
            budget.settle(most, Usage(1, tokens=90))
            return True

        outcomes = await asyncio.gather(*(one(number) for number in range(1, 20)))
        # 9 fit in 900 by what they used; the tenth could pass the limit.
        assert sum(outcomes) == 9
        return budget.spent

    spent = virtual_time.run(spend())
    assert spent.tokens == 100 + 9 * 90
    assert spent.requests == 9


def test_what_an_answer_used_is_never_over_what_was_reserved() -> None:
    settings = teacher(max_tokens=10, prompt_price=1.0, response_price=3.0)
    request = TeacherRequest("m", [{"role": "user", "content": "\u00e9" * 100}])
    most = most_of(request, settings)
    assert most.tokens >= 200 + 10
    assert most.cost == pytest.approx((most.tokens - 10 + 3 * 10) / 1e6)
    assert used_by(TeacherResponse("x"), most) == most
    told = TeacherResponse("x", num_prompt_tokens=5, num_response_tokens=2, cost=0.5)
    assert used_by(told, most) == Usage(1, 7, 0.5)


def recipe(**weights: float) -> CollectRecipe:
    teachers = {name: {"model": name, "weight": weight} for name, weight in weights.items()}
    values = {"prompts": "p", "cache": "c", "teachers": teachers, "responses_per_prompt": 2}
    return CollectRecipe.from_values(values)


def test_teachers_share_the_prompts_by_weight_and_keep_theirs() -> None:
    prompts = chats(1500)
    before = {
        (q.request.messages[0]["content"], q.request.sample_index): q.teacher
        for q in questions(recipe(a=1, b=2), prompts)
    }
    counts = Counter(before.values())
    # 3000 draws: two thirds within four standard deviations.
    assert counts["b"] == pytest.approx(2000, abs=4 * (3000 * 2 / 9) ** 0.5)
    after = {
        (q.request.messages[0]["content"], q.request.sample_index): q.teacher
        for q in questions(recipe(c=1, b=2, a=1), prompts[::-1])
    }
    assert all(after[key] in (before[key], "c") for key in before)
    assert Counter(after.values())["c"] == pytest.approx(750, abs=4 * (3000 * 3 / 16) ** 0.5)


def test_equal_prompts_are_asked_once() -> None:
    asked = list(questions(recipe(a=1), [*chats(3), *chats(3)]))
    assert len(asked) == 6
    assert len({question.request.key for question in asked}) == 6


def test_a_system_turn_of_the_prompt_stays_the_only_one() -> None:
    own = [Message(role="system", content="own"), Message(role="user", content="q")]
    assert with_system_prompt(own, "recipe's") == own
    assert with_system_prompt(own[1:], "recipe's")[0] == {"role": "system", "content": "recipe's"}
    assert with_system_prompt(own[1:], None) == own[1:]


def status_error(status: int, code: str | None = None, **headers: str) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://x"))
    return openai.APIStatusError("key-123 says\nno", response=response, body={"code": code})


@pytest.mark.parametrize(
    ("error", "verdict", "is_maybe_billed"),
    [
        (status_error(400), "reject", False),
        (status_error(403), "reject", False),
        (status_error(422), "reject", False),
        (status_error(401), "stop", False),
        (status_error(404), "stop", False),
        (status_error(307), "stop", False),
        (status_error(429), "retry", False),
        (status_error(429, "insufficient_quota"), "stop", False),
        (status_error(408), "retry", False),
        (status_error(503), "retry", False),
        (TimeoutError(), "retry", True),
        (httpx2.ReadError("gone"), "retry", True),
        (ValueError("no JSON"), "retry", True),
    ],
)
def test_a_failure_means(error: Exception, verdict: str, is_maybe_billed: bool) -> None:
    failure = failure_of(error, "key-123")
    assert (failure.verdict, failure.is_maybe_billed) == (verdict, is_maybe_billed)
    assert "key-123" not in failure.reason
    assert "\n" not in failure.reason


def test_retry_after_is_read_in_seconds_milliseconds_and_as_a_date() -> None:
    assert retry_after_seconds({"retry-after": "2.5"}) == 2.5
    assert retry_after_seconds({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert retry_after_seconds({"retry-after": date}) == pytest.approx(100, abs=5)
    past = email.utils.formatdate(time.time() - 100, usegmt=True)
    assert retry_after_seconds({"retry-after": past}) == 0
    assert [retry_after_seconds({"retry-after": text}) for text in ("soon", "-1", "nan", "")] == [
        None
    ] * 4
    assert retry_after_seconds({}) is None


@pytest.mark.parametrize(
    ("text", "finish_reason", "flags"),
    [
        ("The sky scatters blue.", "stop", ()),
        (" \n", "stop", ("empty",)),
        ("I'm sorry, but I can't help with that.", "stop", ("refusal",)),
        ("I cannot assist you with this request.", "stop", ("refusal",)),
        ("As an AI language model, I am unable to provide that.", "stop", ("refusal",)),
        ("I cannot overstate how good this is.", "stop", ()),
        ("Sorry is the hardest word.", "stop", ()),
        ("", "content_filter", ("empty", "refusal")),
        ("and so on and", "length", ("truncated",)),
    ],
)
def test_flags(text: str, finish_reason: str, flags: tuple[str, ...]) -> None:
    assert flags_of(text, finish_reason, 10, 10) == flags
    assert flags_of(text, finish_reason, 11, 10) == (*flags, "long")
    assert flags_of(text, finish_reason, None, 10) == flags


def test_a_stop_cancels_those_that_wait_and_lets_the_open_finish() -> None:
    async def run() -> list[Any]:
        control = Control()

        async def waits() -> None:
            with control.waiting():
                await asyncio.sleep(1000)

        async def is_open() -> str:
            await asyncio.sleep(10)
            return "finished"

        tasks = [asyncio.create_task(waits()), asyncio.create_task(is_open())]
        await asyncio.sleep(1)
        control.stop("first")
        control.stop("second")
        assert control.reason == "first"
        with pytest.raises(asyncio.CancelledError), control.waiting():
            pass
        return await asyncio.gather(*tasks, return_exceptions=True)

    waiter, opened = virtual_time.run(run())
    assert isinstance(waiter, asyncio.CancelledError)
    assert opened == "finished"
