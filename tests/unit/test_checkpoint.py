"""Checkpoint folders: whole or not there, wherever writing them is cut off; and which are kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gad_fast.config import RunSettings
from gad_fast.errors import CheckpointError
from gad_fast.models.saving import copy_tensors
from gad_fast.run import complete
from gad_fast.run.checkpoint import checkpoint_folder, newest_complete, prune, set_aside_after
from gad_fast.run.complete import COMPLETE, is_complete, problem, write_folder
from gad_fast.run.saver import Saver
from gad_fast.run.tensors import copy_optimizer, copy_random, read_optimizer, restore_random


class Crash(BaseException):
    """Stands in for the end of a process."""


def write(root: Path, step: int, **state: Any) -> Path:
    folder = checkpoint_folder(root, step)
    writers = {name: _writer(f"{name} of {step}") for name in ("student", "random")}
    write_folder(folder, writers, {"step": step, **state})
    return folder


def _writer(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper/b.txt").write_text(text * 2)

    return fill


def crash_at(patch: pytest.MonkeyPatch, point: int) -> None:
    """The `point`-th sync, rename, removal or write raises, and nothing is cleaned up after it."""
    calls = iter(range(1, 1000))
    dead: list[int] = []

    def crashing(original: Callable[..., Any], *, is_cleanup: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if dead and is_cleanup:
                return None
            if dead or next(calls) == point:
                dead.append(point)
                raise Crash
            return original(*arguments, **options)

        return call

    patch.setattr(complete, "sync", crashing(complete.sync))
    patch.setattr(shutil, "rmtree", crashing(shutil.rmtree, is_cleanup=True))
    for name in ("rename", "replace", "write_text", "unlink", "mkdir"):
        patch.setattr(Path, name, crashing(getattr(Path, name)))


def test_a_crash_at_any_write_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    outcomes: list[int] = []
    for point in range(1, 200):
        root = tmp_path / str(point)
        write(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, point)
            try:
                write(root, 2)
                prune(root, RunSettings(keep_last=1))
                is_done = True
            except Crash:
                is_done = False
        newest = newest_complete(root, lambda text: pytest.fail(text))
        assert newest is not None
        step = json.loads((newest / "state.json").read_text())["step"]
        assert (newest / "student/deeper/b.txt").read_text() == f"student of {step}" * 2
        outcomes.append(step)
        if is_done:
            break
        write(root, 2)  # what is left lying about does not stand in the way
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / COMPLETE).unlink(), "COMPLETE cannot be read"),
        (lambda folder: (folder / COMPLETE).write_text("{"), "COMPLETE is not what was written"),
        (lambda folder: (folder / COMPLETE).write_text("[1]"), "COMPLETE is not what was written"),
        (lambda folder: (folder / "student/a.txt").unlink(), "a.txt cannot be read"),
        (lambda folder: (folder / "student/a.txt").write_text("x"), "a.txt has 1 bytes of 12"),
        (
            lambda folder: (folder / "student/a.txt").write_text("student of 2"),
            "student/a.txt has other content than was written",
        ),
    ],
)
def test_harm_to_a_checkpoint_is_seen(
    tmp_path: Path, harm: Callable[[Path], None], reason: str
) -> None:
    folder = write(tmp_path, 1)
    assert is_complete(folder)
    harm(folder)
    assert reason in str(problem(folder))
    said: list[str] = []
    assert newest_complete(tmp_path, said.append) is None
    assert "step-000001 is passed over" in said[0]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, nll in enumerate([3.0, 1.0, 2.0, 1.5, None, 4.0], start=1):
        figures = None if nll is None else {"teacher_nll": nll, "rouge_l": nll / 10}
        write(tmp_path, step, validation=figures)
    prune(tmp_path, RunSettings(keep_last=1, keep_best=2, validate_every=1))
    assert _steps(tmp_path) == [2, 4, 6]
    best = RunSettings(keep_last=1, keep_best=1, validate_every=1, best_by="rouge_l")
    prune(tmp_path, best)
    assert _steps(tmp_path) == [6]


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    set_aside_after(tmp_path, 1)
    assert _steps(tmp_path) == [1]
    assert (tmp_path / "checkpoints/step-000003.broken/student").is_dir()


def _steps(root: Path) -> list[int]:
    folders = (root / "checkpoints").glob("step-??????")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def test_a_failed_save_surfaces_at_the_next_call_once() -> None:
    saver = Saver()

    def fail() -> None:
        raise OSError(28, "No space left on device")

    saver.submit(fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.wait()
    saver.wait()
    done: list[int] = []
    saver.submit(lambda: done.append(1))
    saver.close()
    saver.check()
    assert done == [1]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_an_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    """The copy is taken before further updates, and read into a fresh optimizer."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {}
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(5))]
    first = kind(weights, **options)
    _update(first, weights, 3)
    write_later = copy_optimizer(first.state_dict())
    twins = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    _update(first, weights, 2)
    write_later(tmp_path)
    second = kind(twins, **options)
    second.load_state_dict(read_optimizer(tmp_path))
    _update(second, twins, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))


def _update(optimizer: torch.optim.Optimizer, weights: list[Any], count: int) -> None:
    for _ in range(count):
        torch.stack([(w**3).sum() for w in weights]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.normal()),
            torch.rand(()).item(),
        ]

    draw()
    copy_random()(tmp_path)
    expected = draw()
    draw()
    restore_random(tmp_path)
    assert draw() == expected


def test_copies_share_what_the_originals_share_and_nothing_else() -> None:
    weight = torch.arange(4.0)
    copies = copy_tensors({"tied": weight, "head": weight, "other": weight.clone()})
    weight[0] = 9
    assert copies["tied"] is copies["head"]
    assert copies["tied"].tolist() == copies["other"].tolist() == [0, 1, 2, 3]
