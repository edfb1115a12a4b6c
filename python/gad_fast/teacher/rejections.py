"""Requests that will never succeed, in a file beside the cache, so that no start repeats them."""

from __future__ import annotations

import time
from pathlib import Path

from gad_fast.teacher.records import TeacherRequest
from gad_fast.teacher.side_file import append_line, read_lines


class Rejections:
    """The keys of rejected requests; the file is the user's to read, and to delete to ask again.

    Only the writer of the cache writes it.
    """

    def __init__(self, cache: Path) -> None:
        """Reads the file beside `cache`, if there is one."""
        self.path = cache.with_name(cache.name + ".rejected.jsonl")
        self._keys = {row["key"] for row in read_lines(self.path) if "key" in row}

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
        append_line(self.path, row)
        self._keys.add(request.key)
