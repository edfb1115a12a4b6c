"""Folders that are whole or not there: filled beside their place, synced, marked, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

COMPLETE = "COMPLETE"
"""Marker file: JSON with size and SHA-256 of every other file of the folder."""

Writers = dict[str, Callable[[Path], None]]
"""Subfolder name to a function that fills it."""


def write_folder(target: Path, writers: Writers, state: dict[str, Any] | None = None) -> None:
    """Fills a folder beside `target`, marks it complete, and renames it into place.

    Args:
        target: replaced if it is there.
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
        if state is not None:
            write_json(partial / "state.json", state)
        _mark_complete(partial)
        _move(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export(root: Path, writers: Writers) -> None:
    """Writes subfolders into the run folder itself, each whole or not at all."""
    for name, write in writers.items():
        partial = root / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        for path in partial.rglob("*"):
            sync(path)
        _move(partial, root / name)


def problem(folder: Path) -> str | None:
    """Why a folder is not what was written: one clause, or None when it is."""
    try:
        files: dict[str, Any] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return next(filter(None, (_file_problem(folder, *entry) for entry in files.items())), None)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{COMPLETE} is not what was written"


def is_complete(folder: Path) -> bool:
    """Whether a folder's files are all there, with the content they were written with."""
    return problem(folder) is None


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file that is old or new, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _mark_complete(folder: Path) -> None:
    paths = sorted(folder.rglob("*"))
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
        if path.is_file()
    }
    for path in paths:
        sync(path)
    write_json(folder / COMPLETE, files)


def _file_problem(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return f"{COMPLETE} names {name}, which is outside of the folder"
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} leads out of the folder"
    if path.stat().st_size != expected["size"]:
        return f"{name} has {path.stat().st_size} bytes of {expected['size']}"
    if _sha256(path) != expected["sha256"]:
        return f"{name} has other content than was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
