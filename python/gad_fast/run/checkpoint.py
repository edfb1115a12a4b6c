"""Checkpoints: both players as Hugging Face folders, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

COMPLETE = "COMPLETE"
"""Marker file: JSON with the SHA-256 of every other file of the folder."""

Writers = dict[str, Callable[[Path], None]]
"""Subfolder name to a function that fills it."""


def write_folder(target: Path, writers: Writers, state: dict[str, int | str]) -> None:
    """Fills a folder beside `target`, marks it complete, and renames it into place.

    Args:
        target: must not exist.
        writers: what fills each subfolder.
        state: goes into state.json.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, write in writers.items():
            (partial / name).mkdir()
            write(partial / name)
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _mark_complete(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)


def export(root: Path, writers: Writers) -> None:
    """Writes each subfolder of a checkpoint into the run folder itself, whole or not at all."""
    for name, write in writers.items():
        partial = root / f".{name}.partial"
        partial.mkdir()
        write(partial)
        partial.rename(root / name)


def is_complete(folder: Path) -> bool:
    """Whether a folder's files are all there, with the content they were written with."""
    try:
        hashes: dict[str, str] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / "checkpoints" / f"step-{step:06d}"


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    folders = sorted((root / "checkpoints").glob("step-*"))
    for folder in folders[: max(0, len(folders) - keep)]:
        (folder / COMPLETE).unlink(missing_ok=True)  # never a marked folder with files missing
        shutil.rmtree(folder)


def _mark_complete(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    for path in files:
        _sync(path)
    marker = folder / COMPLETE
    marker.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    _sync(marker)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
