"""How fast a teacher may be asked: requests and tokens a minute, and pauses that it wishes."""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter

from gad_fast.config import TeacherSettings


class Limits:
    """Rate limits of one teacher, within one event loop.

    Both rates hold over every second, not only over a minute: a burst at its start would be
    refused by servers that look closer.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        self._requests = _limiter(settings.requests_per_minute)
        self._tokens = _limiter(settings.tokens_per_minute)
        self._pause_ends = 0.0

    async def admit(self, num_tokens: int) -> None:
        """Returns when a request of about `num_tokens` may be sent."""
        await self._sit_out_pause()
        if self._requests is not None:
            await self._requests.acquire()
        await self.settle(num_tokens)
        await self._sit_out_pause()

    async def settle(self, num_tokens: int) -> None:
        """Counts tokens, and returns when their time has come; nothing for a negative number."""
        if self._tokens is None:
            return
        left = float(num_tokens)
        while left > 0:
            part = min(left, self._tokens.max_rate)
            await self._tokens.acquire(part)
            left -= part

    def pause(self, seconds: float) -> None:
        """Admits nobody for so long."""
        self._pause_ends = max(self._pause_ends, asyncio.get_running_loop().time() + seconds)

    async def _sit_out_pause(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._pause_ends - loop.time()) > 0:
            await asyncio.sleep(left)


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    if per_minute is None:
        return None
    at_once = max(1.0, per_minute / 60)
    return AsyncLimiter(at_once, time_period=60 * at_once / per_minute)
