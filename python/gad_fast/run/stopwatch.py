"""Seconds by phase of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator


class Stopwatch:
    """Adds up wall-clock seconds under names, from its making on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Counts the time spent inside under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def total(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._started
