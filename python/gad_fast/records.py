"""The records that travel between the stages of a step.

Shape letters, the same in the whole project: `B` groups (prompts) of a step, `G` rollouts a group,
`T` response tokens laid end to end, `V` vocabulary, `D` width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of many texts, laid end to end; text `k` is `ids[offsets[k]:offsets[k + 1]]`."""

    ids: Ids
    """All ids, int32 [n]."""
    offsets: NDArray[np.int64]
    """Where each text starts, and the end of the last, int64 [k + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Ids]:
        # As Python's own integers, which slice several times faster than numpy's.
        return (self.ids[start:end] for start, end in pairwise(self.offsets.tolist()))

    @staticmethod
    def of(texts: list[Ids]) -> TokenBatch:
        """Lays a list of id arrays end to end."""
        lengths = np.array([0, *(len(ids) for ids in texts)], dtype=np.int64)
        ids = np.concatenate(texts) if texts else np.empty(0)
        return TokenBatch(ids.astype(np.int32, copy=False), np.cumsum(lengths))


@dataclass(frozen=True, slots=True)
class Response:
    """A response in tokens, whoever wrote it.

    Both sides of the game go through `cut`, so that a student's rollout and the teacher's text
    with the same content are the same ids: a discriminator that reads the last token could
    otherwise tell them apart by their ending alone.
    """

    ids: Ids
    """int32 [R], R >= 1; the last id is the end token exactly when the response is finished."""
    is_finished: bool
    """False when the response was cut at the token limit."""

    @staticmethod
    def cut(ids: Ids, *, end_id: int, max_tokens: int) -> Response:
        """Keeps all up to and including the first end token, and at most `max_tokens`."""
        kept = ids[:max_tokens]
        ends = np.flatnonzero(kept == end_id)
        if len(ends) == 0:
            return Response(kept, is_finished=False)
        return Response(kept[: ends[0] + 1], is_finished=True)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the teacher's response to it, as text."""

    messages: list[Message]
    teacher_response: str


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A prompt and the teacher's response to it, in the student's tokens."""

    example: Example
    """The same as text."""
    prompt_ids: Ids
    """The prompt in the student's chat template, assistant header included."""
    teacher: Response
    """The teacher's response, cut as rollouts are."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one prompt, with the teacher's response."""

    prompt: EncodedExample
    rollouts: list[Response]
    """`group_size` responses of the student."""
