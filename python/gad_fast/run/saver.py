"""One save at a time, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gad_fast.errors import CheckpointError


class Saver:
    """Runs jobs in order while training goes on; what failed surfaces at the next call."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gad-fast-save")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job; waits for the one before, so that at most one copy is held."""
        self.wait()
        self._pending = self._threads.submit(job)

    def check(self) -> None:
        """Raises CheckpointError when the last job has failed; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no job is under way; raises CheckpointError when the last one failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"a checkpoint could not be written: {reason} (the one before is intact: free "
                f"space or mend the disk, then start again to go on from it)"
            ) from error

    def close(self) -> None:
        """Waits for the job under way and ends the thread; tells of no failure."""
        self._threads.shutdown(wait=True)
