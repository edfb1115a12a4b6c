"""Ctrl-C and SIGTERM: the step is finished and a checkpoint written, or the process leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from gad_fast.errors import Interrupted


class InterruptGuard:
    """While entered, notes the first SIGINT or SIGTERM instead of raising.

    After SIGTERM a clock runs: whoever sent it will not wait for long, so a step that does not come
    to its end in time is left with what is on the disk. Outside the main thread, where Python
    delivers no signals, the guard does nothing.
    """

    def __init__(self, on_request: Callable[[], None], *, grace_seconds: float) -> None:
        self.is_requested = False
        self._on_request = on_request
        self._grace_seconds = grace_seconds
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            handlers = {
                signal.SIGINT: self._handle,
                signal.SIGTERM: self._handle,
                signal.SIGALRM: self._leave,
            }
            for number, handler in handlers.items():
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def stop_clock(self) -> None:
        """The step has come to its end in time."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.is_requested:
            self._restore()
            raise KeyboardInterrupt
        self.is_requested = True
        if number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)
        self._on_request()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Interrupted(
            f"stopped within a step {self._grace_seconds:g} s after SIGTERM "
            f"(start again to go on from the last checkpoint; run.grace_seconds is the time given)"
        )

    def _restore(self) -> None:
        if self._previous:
            self.stop_clock()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
