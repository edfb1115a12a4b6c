"""Checkpoints of a run: what one holds, which are kept, and the newest that is whole."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gad_fast.config import RunSettings
from gad_fast.errors import CheckpointError
from gad_fast.run.complete import COMPLETE, Writers, problem, write_folder
from gad_fast.run.saver import Saver

GIB = 2**30
_SPACE_MARGIN = 1.05
"""Folders and small files besides the tensors."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at the end of a step, copied: training may go on while it is written."""

    step: int
    writers: Writers
    """Fill the subfolders from the copies."""
    state: dict[str, Any]
    """What is small; goes into state.json."""
    num_bytes: int
    """About what it takes on the disk."""


class Checkpoints:
    """Writes a run's checkpoints in the background, and removes those that are not to be kept.

    Args:
        root: the run folder.
        settings: how often, and which are kept.
        on_saved: called with the step of a checkpoint once it is on the disk.
    """

    def __init__(self, root: Path, settings: RunSettings, on_saved: Callable[[int], None]) -> None:
        self.saver = Saver()
        self._root, self._settings, self._on_saved = root, settings, on_saved
        self._last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a step is to have a checkpoint."""
        minutes = self._settings.checkpoint_every_minutes
        is_late = minutes is not None and time.monotonic() - self._last_time >= 60 * minutes
        return is_late or step % self._settings.checkpoint_every_steps == 0

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint, unless that of the step is there.

        Raises:
            CheckpointError: the one before has failed, or this one has no room on the disk.
        """
        self.saver.wait()
        if checkpoint_folder(self._root, snapshot.step).exists():
            return
        require_space(self._root, snapshot.num_bytes)
        self.saver.submit(functools.partial(self._write, snapshot))
        self._last_time = time.monotonic()

    def _write(self, snapshot: Snapshot) -> None:
        write_folder(checkpoint_folder(self._root, snapshot.step), snapshot.writers, snapshot.state)
        prune(self._root, self._settings)
        self._on_saved(snapshot.step)


def require_space(root: Path, num_bytes: int) -> None:
    """Raises CheckpointError when `num_bytes` do not fit on the disk of the run folder."""
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    free, wanted = shutil.disk_usage(existing).free, int(num_bytes * _SPACE_MARGIN)
    if wanted > free:
        raise CheckpointError(
            f"a checkpoint takes {wanted / GIB:.2f} GiB, but {root} has {free / GIB:.2f} GiB left "
            f"(free space there, lower run.keep_last, or choose another --output)"
        )


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / "checkpoints" / f"step-{step:06d}"


def newest_complete(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written; says which are passed over."""
    for folder in reversed(_folders(root)):
        reason = problem(folder)
        if reason is None:
            return folder
        say(f"checkpoint {folder.name} is passed over: {reason}")
    return None


def set_aside_after(root: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `*.broken`, so that the run can write its own."""
    for folder in _folders(root):
        if step_of(folder) > step:
            broken = folder.with_suffix(".broken")
            shutil.rmtree(broken, ignore_errors=True)
            folder.rename(broken)


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def prune(root: Path, settings: RunSettings) -> None:
    """Removes all but the newest and the best checkpoints."""
    folders = _folders(root)
    kept = {*folders[-settings.keep_last :], *_best(folders, settings)}
    for folder in folders:
        if folder not in kept:
            (folder / COMPLETE).unlink(missing_ok=True)  # never a marked folder with files missing
            shutil.rmtree(folder)


def _best(folders: list[Path], settings: RunSettings) -> list[Path]:
    if not settings.keep_best:
        return []
    sign = -1.0 if settings.best_by == "rouge_l" else 1.0
    figures = {folder: read_state(folder).get("validation") for folder in folders}
    ranked = sorted((sign * f[settings.best_by], folder) for folder, f in figures.items() if f)
    return [folder for _, folder in ranked[: settings.keep_best]]


def _folders(root: Path) -> list[Path]:
    folders = (root / "checkpoints").glob("step-*")
    return sorted((f for f in folders if f.suffix != ".broken"), key=step_of)
