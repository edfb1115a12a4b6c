"""Ctrl-C: the first lets the step finish and a checkpoint be written, the second leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class InterruptGuard:
    """While entered, notes the first SIGINT or SIGTERM instead of raising.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.is_requested = False
        self._on_request = on_request
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.is_requested:
            self._restore()
            raise KeyboardInterrupt
        self.is_requested = True
        self._on_request()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
