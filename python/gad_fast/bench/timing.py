"""Wall time of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call; what it made is freed outside of it."""
    start = time.perf_counter()
    made = run()
    stop = time.perf_counter()
    del made
    return stop - start
