"""The batch form of the API: a file of requests goes up, a file of answers comes down."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import openai
from openai.types.chat import ChatCompletion

from gad_fast.errors import TeacherError
from gad_fast.teacher.batch_ledger import OpenBatch
from gad_fast.teacher.budget import Usage, most_of
from gad_fast.teacher.failures import RequestFailedError, failure_of, verdict_of
from gad_fast.teacher.keys import without_key
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

if TYPE_CHECKING:
    from openai.types import Batch

    from gad_fast.teacher.client import TeacherClient
    from gad_fast.teacher.collector import Collector

T = TypeVar("T")
Answered = list[tuple[TeacherRequest, TeacherResponse]]

_ENDPOINT = "/v1/chat/completions"
_LABEL = "gad_fast_label"
_OVER = frozenset({"completed", "failed", "expired", "cancelled"})
_CLOCK_SKEW_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A batch under way, and what is asked in it."""

    batch: OpenBatch
    id: str
    requests: dict[str, TeacherRequest]
    """By key, those that are not settled."""


class BatchDesk:
    """Settles requests of one teacher by batches, also by those that an earlier start submitted.

    Batches go on at the provider after a stop; the next start takes them up.
    """

    def __init__(self, collector: Collector, client: TeacherClient) -> None:
        self._collector, self._client = collector, client
        self._ledger, self._budget = collector.batch_ledger, collector.budget
        self._settings = collector.recipe.batch_api

    async def settle(self, requests: list[TeacherRequest]) -> None:
        """Returns when all requests are settled, or when the collection is stopped."""
        waiting = {request.key: request for request in requests}
        try:
            parcels = await self._take_up(waiting)
            while parcels := [*parcels, *await self._submit(waiting)]:
                async with asyncio.TaskGroup() as group:
                    for parcel in parcels:
                        group.create_task(self._follow(parcel))
                parcels = []
        except RequestFailedError as failure:
            self._fail(failure.reason)
        if waiting:
            self._collector.control.stop("the budget is used up")

    async def _take_up(self, waiting: dict[str, TeacherRequest]) -> list[_Parcel]:
        """Batches of earlier starts; what is asked in them no longer waits."""
        parcels: list[_Parcel] = []
        for batch in self._ledger.open_batches(self._client.name):
            batch_id = batch.id or await self._call(lambda batch=batch: self._find(batch))
            if batch_id is None:  # the earlier start ended before it was submitted
                self._ledger.done(batch)
                continue
            requests = {key: waiting.pop(key) for key in batch.keys & waiting.keys()}
            for request in requests.values():
                self._budget.take(self._most(request))
            parcels.append(_Parcel(batch, batch_id, requests))
        return parcels

    async def _submit(self, waiting: dict[str, TeacherRequest]) -> list[_Parcel]:
        """New batches of what waits, as far as the budget holds them."""
        parcels: list[_Parcel] = []
        while requests := self._affordable(waiting):
            batch = self._ledger.begin(self._client.name, frozenset(requests))
            lines = b"".join(self._line(key, request) for key, request in requests.items())
            batch_id = await self._call(lambda lines=lines, batch=batch: self._create(lines, batch))
            self._ledger.submitted(batch, batch_id)
            parcels.append(_Parcel(batch, batch_id, requests))
        return parcels

    def _affordable(self, waiting: dict[str, TeacherRequest]) -> dict[str, TeacherRequest]:
        """The next requests of one batch, with their use reserved; they no longer wait."""
        requests: dict[str, TeacherRequest] = {}
        for key in list(itertools.islice(waiting, self._settings.max_requests)):
            most = self._most(waiting[key])
            if self._collector.control.is_stopping or not self._budget.fits(most):
                break
            self._budget.take(most)
            requests[key] = waiting.pop(key)
        return requests

    def _line(self, key: str, request: TeacherRequest) -> bytes:
        body = {"model": request.teacher, "messages": request.messages, **request.sampling}
        row = {"custom_id": key, "method": "POST", "url": _ENDPOINT, "body": body}
        return json.dumps(row).encode() + b"\n"

    async def _create(self, lines: bytes, batch: OpenBatch) -> str:
        """Submits a batch, unless an attempt whose answer was lost has."""
        if (found := await self._find(batch)) is not None:
            return found
        api = self._client.api
        file = await api.files.create(file=("requests.jsonl", lines), purpose="batch")
        made = await api.batches.create(
            input_file_id=file.id,
            endpoint=_ENDPOINT,
            completion_window="24h",
            metadata={_LABEL: batch.label},
        )
        return made.id

    async def _find(self, batch: OpenBatch) -> str | None:
        """The provider's id of a batch that may have been submitted; new ones are listed first."""
        async for made in self._client.api.batches.list(limit=100):
            if (made.metadata or {}).get(_LABEL) == batch.label:
                return made.id
            if made.created_at < batch.since - _CLOCK_SKEW_SECONDS:
                return None
        return None

    async def _follow(self, parcel: _Parcel) -> None:
        """Waits for a batch, and takes its answers in."""
        try:
            made = await self._wait_for(parcel)
            if made.status == "failed":
                errors = made.errors.data if made.errors else None
                self._fail("; ".join(error.message or "" for error in errors or []))
            for file_id in (made.output_file_id, made.error_file_id):
                if file_id is not None:
                    await self._take_in(parcel, file_id)
            self._leave_rest(parcel, made.status)
        except RequestFailedError as failure:
            if failure.kind != "404":
                self._fail(failure.reason)
                return
            self._leave_rest(parcel, "forgotten by the provider")
        self._ledger.done(parcel.batch)

    async def _wait_for(self, parcel: _Parcel) -> Batch:
        while True:
            made = await self._call(lambda: self._client.api.batches.retrieve(parcel.id))
            if made.status in _OVER:
                return made
            with self._collector.control.waiting():
                await asyncio.sleep(self._settings.poll_seconds)

    async def _take_in(self, parcel: _Parcel, file_id: str) -> None:
        """Stores the answers of a file, then counts them."""
        content = await self._call(lambda: self._client.api.files.content(file_id))
        answered: Answered = []
        for line in content.text.splitlines():
            row = json.loads(line)
            request = parcel.requests.pop(row["custom_id"], None)
            if request is None:
                continue
            try:
                answered.append((request, self._read(row)))
            except RequestFailedError as failure:
                self._give_up(request, failure)
        await asyncio.to_thread(self._collector.cache.put_many, answered)
        for request, response in answered:
            most = self._most(request)
            self._budget.settle(most, self._collector.keep_count(response, most, seconds=0.0))

    def _read(self, row: dict[str, Any]) -> TeacherResponse:
        response: dict[str, Any] = row.get("response") or {}
        status, body = response.get("status_code"), response.get("body") or {}
        if status == 200:
            return self._client.read_completion(ChatCompletion.construct(**body))
        error: dict[str, Any] = row.get("error") or body.get("error") or {}
        reason = without_key(str(error.get("message")), self._client.key)
        verdict = "retry" if status is None else verdict_of(status, error.get("code"))
        raise RequestFailedError(verdict, str(status or error.get("code")), reason)

    def _leave_rest(self, parcel: _Parcel, status: str) -> None:
        for request in parcel.requests.values():
            self._give_up(request, RequestFailedError("retry", status, f"the batch was {status}"))
        parcel.requests.clear()

    def _give_up(self, request: TeacherRequest, failure: RequestFailedError) -> None:
        self._budget.settle(self._most(request), Usage(requests=1))
        self._collector.tally.failures[failure.kind] += 1
        self._collector.give_up(self._client, request, failure)

    def _fail(self, reason: str) -> None:
        text = f"a batch of teachers.{self._client.name} failed: {reason}"
        self._collector.control.stop(text, error=TeacherError(text))

    def _most(self, request: TeacherRequest) -> Usage:
        return most_of(request, self._client.settings)

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """What a call of the API gives, repeated as requests are."""

        async def attempt() -> T:
            try:
                return await call()
            except (openai.OpenAIError, httpx2.HTTPError, TimeoutError, ValueError) as error:
                raise failure_of(error, self._client.key) from error

        return await self._collector.retrying(attempt)
