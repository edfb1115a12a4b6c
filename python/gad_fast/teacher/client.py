"""A teacher behind an OpenAI-compatible chat endpoint, through the official client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import httpx2
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types.chat import ChatCompletion

from gad_fast.config import TeacherSettings
from gad_fast.teacher.failures import failure_of
from gad_fast.teacher.keys import read_key
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.teacher.remarks import flags_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletionChunk

_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server said, streamed or not."""

    text: str
    finish_reason: str | None
    refusal: str | None
    usage: CompletionUsage | None


class TeacherClient:
    """One teacher; made and used within one event loop."""

    def __init__(
        self, name: str, settings: TeacherSettings, *, long_response_tokens: int | None
    ) -> None:
        """Reads the key and opens no connection yet.

        Raises:
            TeacherError: there is no key where the settings say.
        """
        self.name, self.settings = name, settings
        self.key = read_key(name, settings)
        self._long_response_tokens = long_response_tokens
        # httpx gives a second answer that a faulty server sends on a connection to the next
        # request on it, which is another prompt; aiohttp drops such a connection. Retries are
        # ours: the client's own know neither the rate limits nor the budget.
        self.api = AsyncOpenAI(
            api_key=self.key,
            base_url=settings.base_url,
            max_retries=0,
            timeout=httpx2.Timeout(settings.timeout_seconds, connect=_CONNECT_SECONDS),
            http_client=DefaultAioHttpClient(
                limits=httpx2.Limits(max_connections=settings.concurrency + 8)
            ),
        )

    async def ask(self, request: TeacherRequest) -> TeacherResponse:
        """One response, whole.

        Raises:
            RequestFailedError: there is none; says whether to ask again.
        """
        try:
            # The client's own limit starts anew with every piece that drips in.
            async with asyncio.timeout(self.settings.timeout_seconds):
                answer = await (
                    self._stream(request) if self.settings.stream else self._ask(request)
                )
        except (openai.OpenAIError, httpx2.HTTPError, TimeoutError, ValueError) as error:
            raise failure_of(error, self.key) from error
        return self.response_of(answer)

    def read_completion(self, completion: object) -> TeacherResponse:
        """The response in a chat completion that came by other ways than `ask`.

        Raises:
            RequestFailedError: it is no chat completion.
        """
        try:
            return self.response_of(_answer_of(completion))
        except ValueError as error:
            raise failure_of(error, self.key) from error

    def response_of(self, answer: _Answer) -> TeacherResponse:
        """An answer with its cost and flags."""
        usage = answer.usage
        sizes = None if usage is None else (usage.prompt_tokens, usage.completion_tokens)
        num_prompt, num_response = sizes or (None, None)
        text = answer.text or answer.refusal or ""
        flags = flags_of(text, answer.finish_reason, num_response, self._long_response_tokens)
        if answer.refusal and "refusal" not in flags:
            flags = ("refusal", *flags)
        return TeacherResponse(
            text,
            finish_reason=answer.finish_reason,
            num_prompt_tokens=num_prompt,
            num_response_tokens=num_response,
            cost=None if sizes is None else self.settings.cost_of(*sizes),
            flags=flags,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self.api.close()

    async def _ask(self, request: TeacherRequest) -> _Answer:
        completion = await self.api.chat.completions.create(
            model=request.teacher,
            messages=cast("Any", request.messages),
            extra_body=request.sampling,
        )
        return _answer_of(completion)

    async def _stream(self, request: TeacherRequest) -> _Answer:
        stream = await self.api.chat.completions.create(
            model=request.teacher,
            messages=cast("Any", request.messages),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=request.sampling,
        )
        async with stream:
            return await _gather(stream)


def _answer_of(completion: object) -> _Answer:
    # What a server sends is not checked by the client: a page of HTML comes as a text.
    if not isinstance(completion, ChatCompletion):
        raise ValueError(f"the server sent no chat completion but {completion!r:.100}")
    if not completion.choices or completion.choices[0].message is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError("the server sent a chat completion without a choice")
    choice = completion.choices[0]
    message = choice.message
    return _Answer(message.content or "", choice.finish_reason, message.refusal, completion.usage)


async def _gather(stream: AsyncIterator[ChatCompletionChunk]) -> _Answer:
    texts: list[str] = []
    refusals: list[str] = []
    finish_reason = usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in (chunk.choices or [])[:1]:
            texts.append(choice.delta.content or "")
            refusals.append(choice.delta.refusal or "")
            finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        raise ValueError("the stream ended before the response did")
    return _Answer("".join(texts), finish_reason, "".join(refusals) or None, usage)
