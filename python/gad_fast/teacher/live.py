"""A teacher that is asked while something else runs, with the guarantees of a collection."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Sequence
from types import TracebackType

from gad_fast.config import CollectRecipe
from gad_fast.errors import ConfigError, TeacherError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.collector import Collector
from gad_fast.teacher.questions import Chat, Question, questions
from gad_fast.teacher.records import TeacherResponse
from gad_fast.teacher.rejections import Rejections
from gad_fast.teacher.stock import Job, take_stock
from gad_fast.teacher.tally import Tally

Coming = concurrent.futures.Future[TeacherResponse | None]


class LiveTeacher:
    """Asks in a thread of its own; holds the cache while it is entered."""

    def __init__(self, recipe: CollectRecipe, prompts: Sequence[Chat]) -> None:
        """Asks nothing yet.

        Args:
            recipe: who is asked, and how fast; its budget counts what is in the cache.
            prompts: all that may be asked.

        Raises:
            ConfigError: the recipe has a teacher in batch mode, or more than one response a prompt.
        """
        if any(teacher.mode == "batch" for teacher in recipe.teachers.values()):
            raise ConfigError('mode = "batch" takes hours: collect first, then train on the cache')
        if recipe.responses_per_prompt != 1:
            raise ConfigError(
                f"responses_per_prompt must be 1 to collect while training, got "
                f"{recipe.responses_per_prompt} (collect first, then train on the cache)"
            )
        self._recipe, self._prompts = recipe, prompts
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self._coming: dict[str, Coming] = {}
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)

    def __enter__(self) -> LiveTeacher:
        self._cache = TeacherCache.open(self._recipe.cache)
        self._thread.start()
        self._is_ready.wait()
        if self._error is not None:
            self._thread.join()
            self._cache.close()
            raise self._error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets open requests finish: they are paid for."""
        self._loop.call_soon_threadsafe(self._close)
        self._thread.join()
        self._cache.close()

    def ask(self, prompt: Chat) -> Coming:
        """The response to a prompt, or None if there will be none; it is in the cache by then."""
        (question,) = questions(self._recipe, [prompt])
        key = question.request.key
        # A prompt can come again, in the next epoch, before its response is here.
        if (coming := self._coming.get(key)) is None or coming.done():
            coming = asyncio.run_coroutine_threadsafe(self._answer(question), self._loop)
            self._coming[key] = coming
            coming.add_done_callback(lambda _: self._coming.pop(key, None))
        return coming

    def wait_for(self, coming: Coming) -> TeacherResponse | None:
        """What `ask` promised.

        Raises:
            TeacherError: the collection was stopped; says why.
        """
        try:
            return coming.result()
        except concurrent.futures.CancelledError:
            control = self._collector.control
            raise control.error or TeacherError(
                f"no more responses: {control.reason} (the run can be resumed once that is mended)"
            ) from None

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # handed to the thread that waits for it
            self._error = error
        finally:
            self._is_ready.set()

    async def _serve(self) -> None:
        rejections = Rejections(self._recipe.cache)
        stock = take_stock(self._recipe, self._prompts, self._cache, rejections)
        job = Job(self._recipe, self._cache, rejections, stock)
        tally = Tally(stock.num_wanted, stock.num_kept, stock.num_rejected)
        self._collector, self._rejections = Collector(job, tally), rejections
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        self._slots = {
            name: asyncio.Semaphore(teacher.concurrency)
            for name, teacher in self._recipe.teachers.items()
        }
        self._is_ready.set()
        await self._is_over.wait()
        mine = asyncio.current_task()
        await asyncio.gather(*(asyncio.all_tasks() - {mine}), return_exceptions=True)
        await self._collector.close()

    def _close(self) -> None:
        self._collector.control.stop("the training has ended")
        self._is_over.set()

    async def _answer(self, question: Question) -> TeacherResponse | None:
        request = question.request
        if (response := self._cache.get(request)) is not None or request in self._rejections:
            return response
        collector, slot = self._collector, self._slots[question.teacher]
        with collector.control.waiting():
            await slot.acquire()
        try:
            await collector.answer(collector.clients[question.teacher], request)
        finally:
            slot.release()
        return self._cache.get(request)
