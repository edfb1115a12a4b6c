"""How a response ends: with the end token, with a stop string, or at the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gad_fast.records import Ids, Response
from gad_fast.rollout.engine import FinishReason, Sampling

Watch = Callable[[int], bool]
"""Takes the tokens of a response one by one; tells whether a stop string is complete."""


class TextStream(Protocol):
    """A response as text while it is sampled, as `TextCodec.decode_stream` gives it."""

    def push(self, id: int, /) -> str:
        """Takes a token; gives the text that is final with it."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came."""
        ...


class Endings:
    """Where responses end, for one engine.

    Args:
        end_id: the end token.
        text_stream: starts the text of a response that given strings stop; without it, stop strings
            are not taken.
    """

    def __init__(
        self, end_id: int, text_stream: Callable[[Sequence[str]], TextStream] | None = None
    ) -> None:
        self.end_id = end_id
        self._text_stream = text_stream

    def watch(self, sampling: Sampling) -> Watch | None:
        """What watches a response for stop strings, None if there are none."""
        if not sampling.stop:
            return None
        assert self._text_stream is not None, "an engine without text cannot see stop strings"
        stream = self._text_stream(sampling.stop)

        def is_stopped(token: int) -> bool:
            stream.push(token)
            return stream.is_stopped

        return is_stopped

    def cut(self, ids: Ids, sampling: Sampling) -> tuple[Response, FinishReason]:
        """The response in tokens that were sampled without regard to its end."""
        response = Response.cut(ids, end_id=self.end_id, max_tokens=sampling.max_tokens)
        watch = self.watch(sampling)
        if watch is not None:
            for length, token in enumerate(response.ids.tolist(), start=1):
                if token != self.end_id and watch(token):
                    return Response(response.ids[:length], is_finished=False), FinishReason.STOP
        reason = FinishReason.END if response.is_finished else FinishReason.LENGTH
        return response, reason
