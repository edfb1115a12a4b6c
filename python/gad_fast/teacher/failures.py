"""What a failed request means: ask again, never again, or stop asking this teacher at all."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import aiohttp
import httpx2
import openai

from gad_fast.teacher.keys import without_key

Verdict = Literal["retry", "reject", "stop"]

_ASK_AGAIN = frozenset({408, 409, 425, 429})
# No key, no money, no such model or path: the next request would meet the same.
_STOP = frozenset({401, 402, 404, 405})
_OUT_OF_MONEY = frozenset({"insufficient_quota", "billing_not_active"})


@dataclass(slots=True)
class RequestFailedError(Exception):
    """A request that brought no response."""

    verdict: Verdict
    """`retry`: later. `reject`: this request will never succeed. `stop`: none will."""
    kind: str
    """Short, for the count on the screen: `429`, `timeout`, `cut`, `malformed`."""
    reason: str
    """One line, without the key."""
    retry_after_seconds: float | None = None
    """How long the server wants to be left alone."""
    is_maybe_billed: bool = False
    """Whether the server may have done the work all the same."""


def failure_of(error: Exception, key: str) -> RequestFailedError:
    """What an exception of the client means.

    Args:
        error: an exception raised between sending a request and having the whole response.
        key: taken out of the reason.
    """
    reason = without_key(str(error) or type(error).__name__, key)
    match error:
        case openai.APIConnectionError() | httpx2.TransportError() | TimeoutError():
            return _failure_of_connection(error, key)
        case openai.APIStatusError():
            return _failure_of_status(error, reason)
        case _:  # a body that is no JSON, or no chat completion
            return RequestFailedError("retry", "malformed", reason, is_maybe_billed=True)


def verdict_of(status: int, code: str | None) -> Verdict:
    """What an HTTP status, with the error code of its body, means for the request."""
    if status in _STOP or status < 400 or (status == 429 and code in _OUT_OF_MONEY):
        return "stop"
    return "retry" if status in _ASK_AGAIN or status >= 500 else "reject"


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What `Retry-After` or `retry-after-ms` of a response asks for, in seconds, or None."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _failure_of_connection(error: Exception, key: str) -> RequestFailedError:
    causes = list(_causes(error))
    reason = without_key(f"{type(causes[-1]).__name__}: {causes[-1]}", key)
    # The client's transport calls a connection that was cut a time-out of connecting: only
    # aiohttp's own error tells whether the request was sent, which the server may bill.
    if any(isinstance(cause, aiohttp.ClientConnectorError) for cause in causes):
        return RequestFailedError("retry", "no connection", reason)
    is_late = any(isinstance(cause, TimeoutError | httpx2.ReadTimeout) for cause in causes)
    kind = "timeout" if is_late else "cut"
    return RequestFailedError("retry", kind, reason, is_maybe_billed=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _failure_of_status(error: openai.APIStatusError, reason: str) -> RequestFailedError:
    verdict = verdict_of(error.status_code, error.code)
    wait = retry_after_seconds(error.response.headers) if verdict == "retry" else None
    return RequestFailedError(verdict, str(error.status_code), reason, wait)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
