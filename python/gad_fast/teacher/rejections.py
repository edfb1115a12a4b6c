"""Requests that will never succeed, in a file beside the cache, so that no start repeats them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from gad_fast.errors import CacheError
from gad_fast.teacher.records import TeacherRequest


class Rejections:
    """The keys of rejected requests; the file is the user's to read, and to delete to ask again.

    Only the writer of the cache writes it.
    """

    def __init__(self, cache: Path) -> None:
        """Reads the file beside `cache`, if there is one."""
        self.path = cache.with_name(cache.name + ".rejected.jsonl")
        self._keys = {str(row["key"]) for row in _rows(self.path)}

    def __contains__(self, request: TeacherRequest) -> bool:
        return bool(self._keys) and request.key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, request: TeacherRequest, reason: str) -> None:
        """Notes a request, on the disk when this returns.

        Raises:
            CacheError: the file cannot be written.
        """
        row = {
            "key": request.key,
            "teacher": request.teacher,
            "reason": reason,
            "at": time.time(),
            "messages": request.messages,
        }
        try:
            # Begins with a line break: a line that a kill has torn does not take this one along.
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CacheError(f"cannot write {self.path}: {error.strerror}") from error
        self._keys.add(request.key)


def _rows(path: Path) -> list[dict[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}") from error
    rows: list[dict[str, object]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row:
            rows.append(row)
    return rows
