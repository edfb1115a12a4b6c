"""The run folder: recipe, metrics, samples, checkpoints and the final models."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from gad_fast.config import Recipe
from gad_fast.errors import RunFolderError
from gad_fast.run.complete import sync, write_json

SUMMARY = "summary.json"
"""The last file that a run writes: with it, the run is finished."""
_LOGS = ("metrics.jsonl", "samples.jsonl")


class RunFolder:
    """Owns a folder; `metrics.jsonl` and `samples.jsonl` are flushed with every line.

    Args:
        recipe: names the folder, and is written into it.
        sizes: bytes of each log file to go on from; what is beyond was written by steps that will
            be done again. Empty for a new run.
    """

    def __init__(self, recipe: Recipe, sizes: Mapping[str, int]) -> None:
        self.path = recipe.output
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        write_json(self.path / "recipe.json", recipe.model_dump(mode="json"))
        self._files: dict[str, TextIO] = {}
        for name in _LOGS:
            self._cut(name, sizes.get(name, 0))

    @staticmethod
    def require_free(path: Path) -> None:
        """Raises RunFolderError when a run could not start in `path`; creates nothing."""
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"output {path} is a file (choose another output)")
        if path.exists() and any(path.iterdir()):
            raise RunFolderError(
                f"output {path} already holds {_holder(path)} "
                f"(choose another with --output, or remove the folder)"
            )
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise RunFolderError(f"output {path} cannot be written: no permission in {parent}")

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def write_sample(self, values: dict[str, Any]) -> None:
        """Appends a line to samples.jsonl."""
        self._append("samples.jsonl", values)

    def synced_sizes(self) -> dict[str, int]:
        """Bytes of each log file, all of them on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        paths = [self.path / name for name in _LOGS]
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished."""
        self.synced_sizes()
        write_json(self.path / SUMMARY, summary)

    def close(self) -> None:
        """Closes the open files, and lets another process in."""
        for file in self._files.values():
            file.close()
        os.close(self._lock)

    def _cut(self, name: str, size: int) -> None:
        path = self.path / name
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise RunFolderError(
                f"{path} has {there} bytes, but had {size} when the checkpoint was written "
                f"(put the file back, or start anew with another --output)"
            )
        if there > size:
            os.truncate(path, size)
            sync(path)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = (self.path / name).open("a", encoding="utf-8")
        file = self._files[name]
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
        file.flush()


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RunFolderError(
            f"another process trains in {path} (wait for it, or choose another --output)"
        ) from error
    return descriptor


def _holder(path: Path) -> str:
    try:
        name = json.loads((path / "recipe.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return "other files"
    return f"the run {name!r}"
