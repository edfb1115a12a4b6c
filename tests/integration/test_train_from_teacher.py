"""Training on what a teacher gave: from its cache, and while it is asked."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from chat_server import ChatServer, Reply, completion, error, prompt_of, serve
from gad_fast import Recipe, train
from gad_fast.config import CollectRecipe
from gad_fast.data.reading import read_prompts
from gad_fast.errors import ConfigError, TeacherError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collect import collect

ANSWERS = {row["prompt"]: row["teacher_response"] for row in tiny.rows()}


def answer(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
    del server, attempt
    return Reply(body=completion(ANSWERS[prompt_of(body)]))


def write_collect(folder: Path, server: ChatServer, **changes: Any) -> Path:
    """A collection of the prompts of `tiny.rows`."""
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.rows()])
    lines = [f"{name} = {json.dumps(value)}" for name, value in changes.items()]
    path = folder / "collect.toml"
    path.write_text(
        "\n".join(
            [
                f'prompts = "{folder}/prompts.jsonl"',
                f'cache = "{folder}/teacher.cache"',
                "[teachers.a]",
                'model = "scripted"',
                f'base_url = "{server.url}"',
                "max_tokens = 20",
                *lines,
            ]
        )
    )
    return path


def recipe(folder: Path, teacher: str, **data: Any) -> Recipe:
    source = {"train": str(folder / "prompts.jsonl"), "teacher": teacher, **data}
    return tiny.recipe(folder, data=source)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        row["discriminator_loss"]
        for line in lines
        if "discriminator_loss" in (row := json.loads(line))
    ]


def test_a_run_on_a_cache_is_the_run_on_the_same_rows(tmp_path: Path) -> None:
    with serve(answer) as server:
        plan = CollectRecipe.from_toml(write_collect(tmp_path, server))
        collect(plan, read_prompts(plan.prompts, None))
    train(recipe(tmp_path, f"cache:{tmp_path}/teacher.cache"))
    on_cache = losses(tmp_path / "run")
    train(tiny.recipe(tmp_path, output=tmp_path / "rows"))
    assert on_cache == losses(tmp_path / "rows")
    assert len(on_cache) == 6


def test_a_run_that_asks_is_the_run_on_a_cache_and_buys_nothing_twice(tmp_path: Path) -> None:
    with serve(answer) as server:
        teacher = f"collect:{write_collect(tmp_path, server)}"
        train(recipe(tmp_path, teacher, steps_ahead=1))
        asked = len(server.bodies)
        assert set(server.attempts.values()) == {1}
        train(tiny.recipe(tmp_path, output=tmp_path / "rows"))
        assert losses(tmp_path / "run") == losses(tmp_path / "rows")
        again = recipe(tmp_path, teacher, steps_ahead=1).model_copy(
            update={"output": tmp_path / "again"}
        )
        train(again)
        assert len(server.bodies) == asked
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_responses_are_asked_for_no_further_ahead_than_told(tmp_path: Path) -> None:
    with serve(answer) as server:
        teacher = f"collect:{write_collect(tmp_path, server)}"
        plan = tiny.recipe(
            tmp_path,
            data={"train": str(tmp_path / "prompts.jsonl"), "teacher": teacher, "steps_ahead": 1},
            warmup={"steps": 1},
            game={"steps": 0},
        )
        train(plan)
        held_out = len(server.attempts) - 8  # one step of four prompts, and one ahead
        assert 1 <= held_out <= 12


def test_a_prompt_that_is_refused_is_left_out_of_the_batches(tmp_path: Path) -> None:
    refused = [row["prompt"] for row in tiny.rows()][:6]

    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        if prompt_of(body) in refused:
            return error(400, "not this one")
        return answer(server, body, attempt)

    with serve(script) as server:
        train(recipe(tmp_path, f"collect:{write_collect(tmp_path, server)}"))
        assert set(server.attempts.values()) == {1}
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert not any(json.dumps(prompt) in samples for prompt in refused)
    assert len(losses(tmp_path / "run")) == 6


def test_a_teacher_that_cannot_be_asked_ends_the_run_in_its_words(tmp_path: Path) -> None:
    answered: list[str] = []

    def script(server: ChatServer, body: dict[str, Any], attempt: int) -> Reply:
        answered.append(prompt_of(body))
        return error(402, "no money left") if len(answered) > 12 else answer(server, body, attempt)

    with serve(script) as server:
        teacher = f"collect:{write_collect(tmp_path, server, concurrency=1)}"
        with pytest.raises(TeacherError, match=r"cannot ask teachers\.a .402.*no money left"):
            train(recipe(tmp_path, teacher))
    with TeacherCache.open(tmp_path / "teacher.cache") as cache:
        assert len(cache) == 12


@pytest.mark.parametrize(
    ("changes", "message"), [({"mode": "batch"}, "takes hours"), ({}, "responses_per_prompt must")]
)
def test_what_cannot_be_just_in_time_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with serve(answer) as server:
        path = write_collect(tmp_path, server, **changes)
        if not changes:
            path.write_text("responses_per_prompt = 2\n" + path.read_text())
        with pytest.raises(ConfigError, match=message):
            train(recipe(tmp_path, f"collect:{path}"))
        assert server.bodies == []
    assert not (tmp_path / "run").exists()
