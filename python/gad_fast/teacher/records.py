"""What is asked of a teacher, and what it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from gad_fast import _core
from gad_fast.errors import CacheError
from gad_fast.records import Message

CoreRequest = tuple[str, str, str, int]
CoreResponse = tuple[str, str | None, int | None, int | None, float | None, float, Sequence[str]]


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One response that is asked of a teacher; equal requests are bought once.

    Requests are equal when their canonical JSON is: the order of keys and the spelling of numbers
    do not matter (1 and 1.0 are the same temperature), Unicode normalization does.
    """

    teacher: str
    """Name of the teacher, as its server knows it."""
    messages: Sequence[Message | Mapping[str, Any]]
    """The chat, at least one turn; turns may have more keys than `role` and `content`."""
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Everything else that decides the response: temperature, top_p, max_tokens, tools."""
    sample_index: int = 0
    """Which of the responses to this chat, from 0."""

    @property
    def key(self) -> str:
        """BLAKE3 of the request's canonical JSON, in hexadecimal.

        Raises:
            CacheError: a part of the request is no JSON.
        """
        try:
            return _core.cache_key(to_core_request(self))
        except _core.CacheError as error:
            raise CacheError(str(error)) from error


@dataclass(frozen=True, slots=True)
class TeacherResponse:
    """What a teacher answered."""

    text: str
    """The response."""
    finish_reason: str | None = None
    """Why it ended, in the server's words."""
    num_prompt_tokens: int | None = None
    """Tokens of the prompt, as the server counted them."""
    num_response_tokens: int | None = None
    """Tokens of the response, as the server counted them."""
    cost: float | None = None
    """What it cost, in the currency of the bill."""
    created: float = field(default_factory=time.time)
    """When it came, in seconds since 1970 UTC."""
    flags: tuple[str, ...] = ()
    """Remarks, for example `refusal`."""


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A row of the cache."""

    id: int
    """Rows that were stored later have larger numbers."""
    request: TeacherRequest
    """What was asked."""
    response: TeacherResponse
    """What came."""


def to_core_request(request: TeacherRequest) -> tuple[str, object, object, int]:
    """The request as the core takes it."""
    return request.teacher, request.messages, request.sampling, request.sample_index


def to_core_response(response: TeacherResponse) -> CoreResponse:
    """The response as the core takes it."""
    return (
        response.text,
        response.finish_reason,
        response.num_prompt_tokens,
        response.num_response_tokens,
        response.cost,
        response.created,
        response.flags,
    )


def from_core_request(request: CoreRequest) -> TeacherRequest:
    """The request as Python takes it."""
    teacher, messages, sampling, sample_index = request
    return TeacherRequest(
        teacher, cast("list[Message]", json.loads(messages)), json.loads(sampling), sample_index
    )


def from_core_response(response: CoreResponse) -> TeacherResponse:
    """The response as Python takes it."""
    text, finish_reason, num_prompt_tokens, num_response_tokens, cost, created, flags = response
    return TeacherResponse(
        text, finish_reason, num_prompt_tokens, num_response_tokens, cost, created, tuple(flags)
    )
