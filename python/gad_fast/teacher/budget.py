"""What a collection may use: reserved before a request is sent, settled when the answer is here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gad_fast.config import BudgetSettings, TeacherSettings
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

# Turns and template around a prompt, in tokens, generously.
_TOKENS_AROUND_TURN = 16
_TOKENS_AROUND_CHAT = 64
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """Requests, tokens and money."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests, self.tokens + other.tokens, self.cost + other.cost
        )

    def __sub__(self, other: Usage) -> Usage:
        return self + Usage(-other.requests, -other.tokens, -other.cost)


class Budget:
    """Never passed: what an open request can use at most counts as used until it is settled."""

    def __init__(self, settings: BudgetSettings, spent: Usage) -> None:
        """Takes what earlier starts have spent into account."""
        self._settings = settings
        self.spent = spent
        self._reserved = Usage()
        self._num_open = 0
        self._settled = asyncio.Event()

    async def reserve(self, most: Usage) -> bool:
        """Sets `most` aside, if need be after open requests are settled: whether it fits."""
        while not self.fits(most):
            if self._num_open == 0:
                return False
            await self._settled.wait()
        self.take(most)
        return True

    def fits(self, most: Usage) -> bool:
        """Whether `most` can be set aside now."""
        total, limits = self.spent + self._reserved + most, self._settings
        return (
            (limits.requests is None or total.requests <= limits.requests)
            and (limits.tokens is None or total.tokens <= limits.tokens)
            and (limits.cost is None or total.cost <= limits.cost)
        )

    def take(self, most: Usage) -> None:
        """Sets `most` aside, whether it fits or not."""
        self._reserved += most
        self._num_open += 1

    def settle(self, most: Usage, used: Usage) -> None:
        """Puts what was used in the place of what was set aside."""
        self._reserved -= most
        self.spent += used
        self._num_open -= 1
        self._settled.set()
        self._settled = asyncio.Event()


def most_of(request: TeacherRequest, settings: TeacherSettings) -> Usage:
    """What a request can use at most: a token is a byte at least, and the response is bounded."""
    num_turns = len(request.messages)
    prompt = _num_bytes(request) + _TOKENS_AROUND_TURN * num_turns + _TOKENS_AROUND_CHAT
    response = settings.max_tokens or 0
    return Usage(1, prompt + response, settings.cost_of(prompt, response) or 0.0)


def used_by(response: TeacherResponse, most: Usage) -> Usage:
    """What a response used; where the server does not say, all that it could."""
    if response.num_prompt_tokens is None or response.num_response_tokens is None:
        return most
    tokens = response.num_prompt_tokens + response.num_response_tokens
    return Usage(1, tokens, response.cost or 0.0)


def guess_prompt_tokens(request: TeacherRequest) -> int:
    """About how many tokens a prompt has, for the rate limit."""
    return _num_bytes(request) // _BYTES_PER_TOKEN + _TOKENS_AROUND_TURN


def _num_bytes(request: TeacherRequest) -> int:
    return sum(len(str(turn["content"]).encode("utf-8", "replace")) for turn in request.messages)
