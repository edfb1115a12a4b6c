"""How a collection is stopped: what is open is finished, what waits is not begun."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Generator

from gad_fast.errors import GadFastError


class Control:
    """The stop switch of one collection, within one event loop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.error: GadFastError | None = None
        self.is_interrupted = False
        self._waiting: set[asyncio.Task[object]] = set()

    @property
    def is_stopping(self) -> bool:
        """Whether no request may be begun."""
        return self.reason is not None

    def stop(self, reason: str, *, error: GadFastError | None = None) -> None:
        """Lets open requests finish and cancels those that wait; the first reason stays."""
        if self.is_stopping:
            return
        self.reason, self.error = reason, error
        for task in self._waiting:
            task.cancel()

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Marks the current task as one that a stop may cancel."""
        if self.is_stopping:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    @contextlib.contextmanager
    def on_interrupt(self) -> Generator[None]:
        """Within, Ctrl-C stops once and cancels the current task the second time.

        Outside the main thread, where no signals are delivered, it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._interrupt, task)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _interrupt(self, task: asyncio.Task[object]) -> None:
        if self.is_interrupted:
            task.cancel()
        self.is_interrupted = True
        self.stop("interrupted")
