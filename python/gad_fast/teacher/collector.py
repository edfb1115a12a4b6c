"""Many requests at once, within limits and budget; each answer is in the cache before it counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from gad_fast.config import TeacherSettings
from gad_fast.errors import TeacherError
from gad_fast.teacher.batch_api import BatchDesk
from gad_fast.teacher.batch_ledger import BatchLedger
from gad_fast.teacher.budget import Budget, Usage, guess_prompt_tokens, most_of, used_by
from gad_fast.teacher.client import TeacherClient
from gad_fast.teacher.control import Control
from gad_fast.teacher.failures import RequestFailedError
from gad_fast.teacher.limits import Limits
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.teacher.stock import Job
from gad_fast.teacher.tally import Tally

_FIRST_GUESS_RESPONSE_TOKENS = 256


class Collector:
    """Asks teachers and keeps their answers; made and used within one event loop."""

    def __init__(self, job: Job, tally: Tally) -> None:
        """Reads the keys and sends nothing yet.

        Raises:
            TeacherError: a teacher has no key.
        """
        recipe = job.recipe
        self.recipe, self.cache, self.tally = job.recipe, job.cache, tally
        self._rejections, self.batch_ledger = job.rejections, BatchLedger(job.cache.path)
        self.budget, self.control = Budget(recipe.budget, job.stock.spent), Control()
        self.clients = {
            name: TeacherClient(name, settings, long_response_tokens=recipe.long_response_tokens)
            for name, settings in recipe.teachers.items()
        }
        self._limits = {name: Limits(settings) for name, settings in recipe.teachers.items()}
        self.retrying = AsyncRetrying(
            stop=stop_after_attempt(recipe.retry.max_attempts),
            wait=self._seconds_to_wait,
            retry=retry_if_exception(_is_worth_another),
            sleep=self._sleep,
            reraise=True,
        )
        self._backoff = wait_exponential_jitter(
            multiplier=recipe.retry.first_wait_seconds,
            max=recipe.retry.longest_wait_seconds,
            jitter=recipe.retry.first_wait_seconds,
        )

    async def collect(self, pending: Mapping[str, list[TeacherRequest]]) -> None:
        """Returns when all requests are settled, or what was open at a stop is.

        Why it stopped is in `control`.
        """
        async with asyncio.TaskGroup() as group:
            for name, requests in pending.items():
                client, feed = self.clients[name], iter(requests)
                if client.settings.mode == "batch":
                    group.create_task(BatchDesk(self, client).settle(requests))
                    continue
                for _ in range(min(client.settings.concurrency, len(requests))):
                    group.create_task(self._work(client, feed))

    async def answer(self, client: TeacherClient, request: TeacherRequest) -> None:
        """Settles one request: its response is in the cache, or its failure is counted.

        Raises:
            asyncio.CancelledError: the collection stopped before it was sent.
        """
        try:
            await self.retrying(self._attempt, client, request)
        except RequestFailedError as failure:
            self.give_up(client, request, failure)

    def keep_count(self, response: TeacherResponse, most: Usage, seconds: float) -> Usage:
        """Counts a response that is in the cache: what it used."""
        used = used_by(response, most)
        self.tally.count(response, used, seconds)
        return used

    def give_up(
        self, client: TeacherClient, request: TeacherRequest, failure: RequestFailedError
    ) -> None:
        """Records a request that brought nothing, and stops the collection if it is one of many."""
        if failure.verdict == "stop":
            reason = f"{client.name} ({failure.kind}): {failure.reason}"
            self.control.stop(reason, error=TeacherError(f"cannot ask teachers.{reason}"))
        elif failure.verdict == "reject":
            self._rejections.add(request, f"{failure.kind}: {failure.reason}")
            self.tally.num_rejected += 1
        else:
            self.tally.num_given_up += 1
        self._judge_failures(failure)

    async def close(self) -> None:
        """Closes all connections."""
        for client in self.clients.values():
            await client.close()

    async def _work(self, client: TeacherClient, feed: Iterator[TeacherRequest]) -> None:
        for request in feed:
            await self.answer(client, request)

    async def _attempt(self, client: TeacherClient, request: TeacherRequest) -> TeacherResponse:
        settings, limits = client.settings, self._limits[client.name]
        most, guess = most_of(request, settings), self._guess_tokens(request, settings)
        with self.control.waiting():
            await limits.admit(guess)
            await self._reserve(most)
        used, started = Usage(), time.monotonic()
        try:
            response = await client.ask(request)
            await self.cache.aput(request, response)
            used = self.keep_count(response, most, time.monotonic() - started)
        except RequestFailedError as failure:
            used = most if failure.is_maybe_billed else Usage(requests=1)
            self.tally.failures[failure.kind] += 1
            if failure.verdict == "retry" and failure.retry_after_seconds is not None:
                limits.pause(failure.retry_after_seconds)
            raise
        finally:
            self.budget.settle(most, used)
        with self.control.waiting():
            await limits.settle(used.tokens - guess)
        return response

    async def _reserve(self, most: Usage) -> None:
        if not await self.budget.reserve(most):
            self.control.stop("the budget is used up")
            raise asyncio.CancelledError

    def _guess_tokens(self, request: TeacherRequest, settings: TeacherSettings) -> int:
        mean = self.tally.mean_response_tokens
        if mean is None:
            mean = min(settings.max_tokens or _FIRST_GUESS_RESPONSE_TOKENS, 4096)
        return guess_prompt_tokens(request) + round(mean)

    def _judge_failures(self, failure: RequestFailedError) -> None:
        tally, retry = self.tally, self.recipe.retry
        num_failed = tally.num_rejected + tally.num_given_up
        is_judged = tally.num_settled >= retry.min_judged
        if is_judged and num_failed > retry.max_failed_share * tally.num_settled:
            reason = f"{num_failed} of {tally.num_settled} requests failed"
            self.control.stop(
                reason,
                error=TeacherError(
                    f"{reason}, over retry.max_failed_share = {retry.max_failed_share}; the last "
                    f"with {failure.kind}: {failure.reason} (mend the recipe and start again)"
                ),
            )

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        assert state.outcome is not None
        failure = state.outcome.exception()
        assert isinstance(failure, RequestFailedError), failure
        wished = failure.retry_after_seconds
        return self._backoff(state) if wished is None else wished

    async def _sleep(self, seconds: float) -> None:
        with self.control.waiting():
            await asyncio.sleep(seconds)


def _is_worth_another(error: BaseException) -> bool:
    return isinstance(error, RequestFailedError) and error.verdict == "retry"
