"""Small files of JSON lines beside a cache, which survive a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from gad_fast.errors import CacheError


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends a row, which is on the disk when this returns.

    Raises:
        CacheError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            # Begins with a line break: a line that a kill has torn does not take this one along.
            file.write("\n" + json.dumps(row))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without torn ones; none if there is no file.

    Raises:
        CacheError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(cast("dict[str, Any]", row))
    return rows
