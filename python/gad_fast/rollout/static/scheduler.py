"""Which rollout is in which row of the cache, and what it has sampled: no tensors, no model.

Active rollouts are rows 0 to `num_active - 1`. When one finishes, the last active row moves into
its place; when enough rows are free, waiting rollouts enter behind the active ones. A row keeps
its prompt's keys and values as long as a rollout is in it, so that the prompt is computed once for
all rollouts that enter meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gad_fast.records import Ids, Logprobs
from gad_fast.rollout.endings import Watch
from gad_fast.rollout.engine import FinishReason, GenRequest
from gad_fast.rollout.streams import stream_key


class Rollout(NamedTuple):
    """One of the responses to a request."""

    request: GenRequest
    number: int
    watch: Watch | None

    @property
    def num_prefix(self) -> int:
        """Tokens before the one that the first decode step reads, which is the prompt's last."""
        return len(self.request.prompt_ids) - 1


class Entry(NamedTuple):
    """A rollout that enters a row."""

    row: int
    rollout: Rollout
    source: int | None
    """The row that holds the prompt's keys and values, None if they must be computed."""


class Finished(NamedTuple):
    """A rollout that leaves its row to the last active one."""

    rollout: Rollout
    ids: Ids
    logprobs: Logprobs
    reason: FinishReason
    row: int
    last_row: int
    num_cached: int
    """Tokens of the last row that are in the cache."""


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
        self._keys = np.zeros(num_rows, dtype=np.uint64)
        state = np.zeros((3, num_rows), dtype=np.int64)
        self._inputs, self._positions, self._sampled = state
        self._columns = (self._ids, self._logprobs, self._keys, *state)

    @property
    def num_active(self) -> int:
        """Rows that sample."""
        return len(self._active)

    @property
    def reads(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The token that each active row reads next, and where in its sequence that is."""
        return self._inputs[: self.num_active], self._positions[: self.num_active]

    @property
    def draws(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Of each active row the key of its random stream, and how many numbers it has used."""
        return self._keys[: self.num_active], self._sampled[: self.num_active]

    def enter(self) -> list[Entry]:
        """Gives free rows to waiting rollouts: a block at a time, or whatever is left."""
        num_free = len(self._prompts) - self.num_active
        if self._active and num_free < min(self._refill, len(self._waiting)):
            return []
        return [self._enter() for _ in range(min(num_free, len(self._waiting)))]

    def record(self, ids: NDArray[np.int64], logprobs: Logprobs) -> list[Finished]:
        """Notes a token of each active row; takes out what ends with it, last row first."""
        rows, num_sampled = np.arange(self.num_active), self._sampled[: self.num_active]
        self._ids[rows, num_sampled], self._logprobs[rows, num_sampled] = ids, logprobs
        self._inputs[rows] = ids
        self._positions[rows] += 1
        self._sampled[rows] += 1
        has_ended, is_full = ids == self._end_id, num_sampled == self._max_tokens
        is_stopped = np.zeros_like(has_ended)
        for row, rollout in enumerate(self._active):
            if rollout.watch is not None and not has_ended[row]:
                is_stopped[row] = rollout.watch(int(ids[row]))
        ends = np.flatnonzero(has_ended | is_full | is_stopped)[::-1].tolist()
        return [self._leave(row, _reason(has_ended[row], is_stopped[row])) for row in ends]

    def _leave(self, row: int, reason: FinishReason) -> Finished:
        last, length = self.num_active - 1, self._sampled[row]
        ids, logprobs = self._ids[row, :length].copy(), self._logprobs[row, :length].copy()
        num_cached = int(self._positions[last])
        finished = Finished(self._active[row], ids, logprobs, reason, row, last, num_cached)
        for column in self._columns:
            column[row] = column[last]
        self._prompts[row], self._active[row] = self._prompts[last], self._active[last]
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
        self._keys[row] = stream_key(request.seed, request.group_id, rollout.number)
        self._positions[row], self._sampled[row] = rollout.num_prefix, 0
        return entry


def _reason(has_ended: bool, is_stopped: bool) -> FinishReason:
    if has_ended:
        return FinishReason.END
    return FinishReason.STOP if is_stopped else FinishReason.LENGTH
