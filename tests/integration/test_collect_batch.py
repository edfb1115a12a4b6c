"""A collection through the batch form of the API: submitted once, whatever ends a start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_server import BatchServer, serve_batches
from chat_server import answer_to
from collecting import chats, recipe
from gad_fast.config import CollectRecipe
from gad_fast.errors import TeacherError
from gad_fast.records import Message
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collect import collect

START = """
import json, sys
from gad_fast.config import CollectRecipe
from gad_fast.teacher.collect import collect

collect(CollectRecipe.from_values(json.loads(sys.argv[1])), json.loads(sys.argv[2]))
"""


def batch_recipe(folder: Path, server: BatchServer, **changes: Any) -> CollectRecipe:
    teacher = {"mode": "batch", **changes.pop("teacher", {})}
    batch_api = {"max_requests": 5, "poll_seconds": 0.01, **changes.pop("batch_api", {})}
    return recipe(folder, server.url, teacher=teacher, batch_api=batch_api, **changes)


def answers(path: Path) -> dict[str, str]:
    with TeacherCache.open(path, read_only=True) as cache:
        return {row.request.messages[-1]["content"]: row.response.text for row in cache}


def own_answers(count: int) -> dict[str, str]:
    return {f"q {index}": answer_to(f"q {index}") for index in range(count)}


def chat(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_batches_bring_every_answer_to_its_prompt(tmp_path: Path) -> None:
    with serve_batches() as server:
        plan = batch_recipe(tmp_path, server, teacher={"system_prompt": "Be brief."})
        result = collect(plan, chats(12))
        assert result.tally.num_new == 12
        assert result.tally.used.tokens == sum(10 + len(text) for text in own_answers(12).values())
        assert [
            len(server.files[b["input_file_id"]].splitlines()) for b in server.batches.values()
        ] == [5, 5, 2]
        row = server.rows()[0]
        assert row["url"] == "/v1/chat/completions"
        assert row["body"]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert collect(plan, chats(12)).tally.num_new == 0
        assert len(server.batches) == 3
    assert answers(tmp_path / "teacher.cache") == own_answers(12)


def test_refused_rows_are_recorded_and_expired_ones_asked_by_the_next_start(tmp_path: Path) -> None:
    prompts = [*chats(8), chat("bad one"), chat("late one")]
    with serve_batches() as server:
        plan = batch_recipe(tmp_path, server, batch_api={"max_requests": 50})
        first = collect(plan, prompts)
        assert (first.tally.num_new, first.tally.num_rejected, first.tally.num_given_up) == (
            8,
            1,
            1,
        )
        assert first.tally.failures == {"400": 1, "batch_expired": 1}
        rejected = json.loads(first.rejected.read_text().splitlines()[1])
        assert rejected["reason"] == "400: not this prompt"
        collect(plan, prompts)
        asked = [row["body"]["messages"][0]["content"] for row in server.rows()]
        assert asked[10:] == ["late one"]


def start(plan: CollectRecipe, count: int) -> subprocess.Popen[bytes]:
    words = [plan.model_dump_json(), json.dumps(chats(count))]
    return subprocess.Popen([sys.executable, "-c", START, *words])


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["before the id was noted", "while it is under way"])
def test_a_killed_start_submits_nothing_twice(moment: str, tmp_path: Path) -> None:
    with serve_batches() as server:
        server.polls_until_done = 10**9
        server.answers_creation = moment == "while it is under way"
        plan = batch_recipe(tmp_path, server, batch_api={"max_requests": 50})
        process = start(plan, 8)
        assert server.created.wait(30)
        if server.answers_creation:
            assert server.polled.wait(30)
        process.kill()
        process.wait()
        server.answers_creation = True
        server.polls_until_done = server.batches["batch-0"]["polls"] + 1
        assert collect(plan, chats(8)).tally.num_new == 8
        assert len(server.batches) == 1
    assert answers(tmp_path / "teacher.cache") == own_answers(8)


def test_a_batch_whose_creation_seemed_to_fail_is_not_created_again(tmp_path: Path) -> None:
    with serve_batches() as server:
        server.failures_of_creation = 1
        assert collect(batch_recipe(tmp_path, server), chats(4)).tally.num_new == 4
        assert len(server.batches) == 1


def test_a_failed_batch_is_told_in_the_providers_words(tmp_path: Path) -> None:
    with serve_batches() as server:
        server.final_status = "failed"
        with pytest.raises(TeacherError, match=r"teachers\.a failed: no batches for this model"):
            collect(batch_recipe(tmp_path, server), chats(4))


def test_a_batch_holds_what_the_budget_holds(tmp_path: Path) -> None:
    with serve_batches() as server:
        plan = batch_recipe(tmp_path, server, budget={"requests": 7})
        result = collect(plan, chats(30))
        assert result.stopped == "the budget is used up"
        assert result.tally.num_new == len(server.rows()) == 7
