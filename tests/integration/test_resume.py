"""A run that is cut off anywhere goes on as if nothing had happened, bit for bit."""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import crash
import tiny
from gad_fast import Recipe, train
from gad_fast.errors import CheckpointError, HealthError, Interrupted, RunFolderError
from gad_fast.game.loop import Step
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.run import checkpoint, complete
from gad_fast.run.display import Display
from gad_fast.run.recorder import Recorder

NUM_KILLS = int(os.environ.get("GAD_FAST_KILLS", "3"))
"""`make kills` has 25."""
OFTEN = {"checkpoint_every_steps": 2}


class Crash(BaseException):
    """Stands in for the end of a process."""


def recipe(folder: Path, output: str, **sections: Any) -> Recipe:
    return tiny.recipe(folder, output=folder / output, **{"run": OFTEN, **sections})


def outcome_of_unbroken(folder: Path, **sections: Any) -> dict[str, Any]:
    train(recipe(folder, "unbroken", **sections))
    return crash.outcome(folder / "unbroken")


def cut_off(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, owner: Any, name: str, call: int
) -> None:
    """Trains until the `call`-th call of a function, and raises Crash instead of it."""
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def crashing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Crash
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crashing)
        with pytest.raises(Crash):
            train(recipe)


def screen() -> tuple[Display, Callable[[], str]]:
    console = Console(record=True, width=200, quiet=False)
    return Display(console), console.export_text


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL, spread over warm-up and game; in between the run is started again each time."""
    steps = max(3, NUM_KILLS // 2)
    stages = {"warmup": {"steps": steps}, "game": {"steps": steps + steps % 2}}
    stages["game"]["steps"] = 2 * steps - steps if steps % 2 == 0 else steps
    unbroken, broken = (recipe(tmp_path, name, **stages) for name in ("unbroken", "broken"))
    assert crash.run(unbroken) == 0
    metrics, moments = tmp_path / "broken/metrics.jsonl", random.Random(0)
    num_lines = crash.lines(tmp_path / "unbroken/metrics.jsonl")
    num_killed = 0
    for kill in range(NUM_KILLS):
        wanted = kill * num_lines // NUM_KILLS
        process = crash.start(broken)
        num_killed += crash.kill_when(process, metrics, wanted, moments.uniform(0, 0.15))
        assert process.exitcode in (0, -signal.SIGKILL)
    assert num_killed >= NUM_KILLS - 1
    if not (tmp_path / "broken/summary.json").exists():
        assert crash.run(broken) == 0
    crash.assert_same(
        crash.outcome(tmp_path / "unbroken"), crash.outcome(tmp_path / "broken")
    )


@pytest.mark.parametrize("method", ["gad", "seqkd"])
def test_cut_off_after_each_step_a_run_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    falling = {"student": {"peak": 1e-3, "schedule": "linear"}}
    sections: dict[str, Any] = {"method": method, "game": falling, "warmup": falling}
    unbroken = outcome_of_unbroken(tmp_path, **sections)
    for _ in range(len(unbroken["metrics"]) // 2):
        cut_off(monkeypatch, recipe(tmp_path, "broken", **sections), Recorder, "write_step", 3)
        if len(crash.records(tmp_path / "broken/metrics.jsonl")) > len(unbroken["metrics"]) - 4:
            break
    train(recipe(tmp_path, "broken", **sections))
    crash.assert_same(unbroken, crash.outcome(tmp_path / "broken"))
