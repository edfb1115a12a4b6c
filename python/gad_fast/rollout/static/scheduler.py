"""Which rollout is in which row of the cache, and what it has sampled: no tensors, no model.

Active rollouts are rows 0 to `num_active - 1`. When one finishes, the last active row moves into
its place; when enough rows are free, waiting rollouts enter behind the active ones. A row keeps
its prompt's keys and values as long as a rollout is in it, so that the prompt is computed once for
all rollouts that enter meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gad_fast.records import Ids, Logprobs
from gad_fast.rollout.endings import Watch
from gad_fast.rollout.engine import FinishReason, GenRequest
from gad_fast.rollout.streams import stream_key


@dataclass(frozen=True, slots=True)
class Rollout:
    """One of the responses to a request."""

    request: GenRequest
    index: int
    watch: Watch | None

    @property
    def num_prefix(self) -> int:
        """Tokens before the one that the first decode step reads, which is the prompt's last."""
        return len(self.request.prompt_ids) - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A rollout that enters a row."""

    row: int
    rollout: Rollout
    source: int | None
    """The row that holds the prompt's keys and values, None if they must be computed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A rollout that leaves."""

    rollout: Rollout
    ids: Ids
    logprobs: Logprobs
    reason: FinishReason


class Scheduler:
    """Rows for rollouts that wait, sample and finish."""

    def __init__(
        self, rollouts: Sequence[Rollout], *, num_rows: int, max_tokens: int, end_id: int
    ) -> None:
        self._waiting = deque(rollouts)
        self._active: list[Rollout] = []
        self._prompts: list[GenRequest | None] = [None] * num_rows
        self._refill = max(1, num_rows // 8)
        self._end_id, self._max_tokens = end_id, max_tokens
        self._ids = np.zeros((num_rows, max_tokens), dtype=np.int32)
        self._logprobs = np.zeros((num_rows, max_tokens), dtype=np.float32)
        self._keys = np.zeros((num_rows,), dtype=np.uint64)
        self._lengths = np.zeros((2, num_rows), dtype=np.int64)  # tokens read, tokens sampled
        self._inputs = np.zeros((num_rows,), dtype=np.int64)

    @property
    def num_active(self) -> int:
        """Rows that sample."""
        return len(self._active)

    @property
    def inputs(self) -> NDArray[np.int64]:
        """The token that each active row reads next."""
        return self._inputs[: self.num_active]

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where in its sequence that token is."""
        return self._lengths[0, : self.num_active]

    @property
    def draws(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Of each active row the key of its random stream, and how many numbers it has used."""
        return self._keys[: self.num_active], self._lengths[1, : self.num_active]

    def enter(self) -> list[Entry]:
        """Gives free rows to waiting rollouts: a block at a time, or whatever is left."""
        num_free = len(self._prompts) - self.num_active
        if self._active and num_free < min(self._refill, len(self._waiting)):
            return []
        return [self._enter() for _ in range(min(num_free, len(self._waiting)))]

    def record(self, ids: NDArray[np.int64], logprobs: Logprobs) -> list[tuple[int, FinishReason]]:
        """Notes a token of each active row; gives the rows that finish with it, last row first."""
        rows, num_sampled = np.arange(self.num_active), self._lengths[1, : self.num_active]
        self._ids[rows, num_sampled], self._logprobs[rows, num_sampled] = ids, logprobs
        self._inputs[rows] = ids
        self._lengths[:, rows] += 1
        has_ended, is_full = ids == self._end_id, num_sampled == self._max_tokens
        is_stopped = np.zeros_like(has_ended)
        for row, rollout in enumerate(self._active):
            if rollout.watch is not None and not has_ended[row]:
                is_stopped[row] = rollout.watch(int(ids[row]))
        ends = np.flatnonzero(has_ended | is_full | is_stopped)[::-1].tolist()
        return [(row, _reason(bool(has_ended[row]), bool(is_stopped[row]))) for row in ends]

    @property
    def last_row(self) -> tuple[int, int]:
        """The last active row, and how many tokens of it are in the cache."""
        last = self.num_active - 1
        return last, int(self._lengths[0, last])

    def leave(self, row: int, reason: FinishReason) -> Finished:
        """Takes a rollout out; the last active one has its row from now on."""
        num_sampled = self._lengths[1, row]
        finished = Finished(
            self._active[row],
            self._ids[row, :num_sampled].copy(),
            self._logprobs[row, :num_sampled].copy(),
            reason,
        )
        last = self.num_active - 1
        for column in (self._ids, self._logprobs, self._keys, self._inputs):
            column[row] = column[last]
        self._lengths[:, row] = self._lengths[:, last]
        self._prompts[row] = self._prompts[last]
        self._active[row] = self._active[last]
        self._active.pop()
        return finished

    def _enter(self) -> Entry:
        row, rollout = self.num_active, self._waiting.popleft()
        request = rollout.request
        # Other free rows may hold the prompt too, but may be overwritten before it is copied.
        sources = (at for at, held in enumerate(self._prompts[:row]) if held is request)
        entry = Entry(row, rollout, row if self._prompts[row] is request else next(sources, None))
        self._active.append(rollout)
        self._prompts[row] = request
        self._inputs[row] = request.prompt_ids[-1]
        self._keys[row] = stream_key(request.seed, request.group_id, rollout.index)
        self._lengths[:, row] = rollout.num_prefix, 0
        return entry


def _reason(has_ended: bool, is_stopped: bool) -> FinishReason:
    if has_ended:
        return FinishReason.END
    return FinishReason.STOP if is_stopped else FinishReason.LENGTH
