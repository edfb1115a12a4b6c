"""Decode steps of a few sizes, recorded once a call of `generate` and replayed.

A step is hundreds of kernels, which a host starts more slowly than a GPU runs those of a small
model. A CUDA graph starts them all at once, on tensors of fixed sizes in fixed places.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast.rollout.failures import in_a_line

WIDTH = 64
"""Columns are seen in multiples of it."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what runs on a device; gives what does all of it again, on the same tensors."""


class Size(NamedTuple):
    """Of a decode step."""

    rows: int
    width: int
    """Columns of the cache that it sees."""


class Graphs:
    """Runs a decode step as a recorded one that is as large or larger.

    Args:
        record: None runs each step as it is.
        largest: all rows and columns.
        step: gives logits [rows, V] of a size, from inputs that stay in their place.
    """

    def __init__(
        self, record: Recorder | None, largest: Size, step: Callable[[Size], Tensor]
    ) -> None:
        self._record, self._largest, self._step = record, largest, step
        self._replays: dict[Size, Callable[[], None]] = {}
        self._logits: Tensor | None = None

    def size(self, rows: int, width: int) -> Size:
        """That of the step to run: halves of all rows, multiples of `WIDTH` columns."""
        if self._record is None:
            return Size(rows, width)
        recorded = self._largest.rows
        while recorded // 2 >= rows:
            recorded //= 2
        return Size(recorded, min(-(-width // WIDTH) * WIDTH, self._largest.width))

    def logits(self, size: Size) -> Tensor:
        """[rows, V]; they hold until the next step."""
        if self._record is not None and size not in self._replays:
            self._try(self._record, size)
        if self._record is None:
            return self._step(size)
        self._replays[size]()
        assert self._logits is not None
        return self._logits[: size.rows]

    def _try(self, record: Recorder, size: Size) -> None:
        if self._logits is None:
            # Outside of all graphs, so that they may share the rest of their memory.
            logits = self._step(size)
            self._logits = logits.new_empty(self._largest.rows, logits.shape[1])
        target = self._logits[: size.rows]

        def run() -> None:
            target.copy_(self._step(size))

        try:
            self._replays[size] = record(run)
        except RuntimeError as error:
            self._record = None
            why = in_a_line(error)
            warnings.warn(f"decode steps run without CUDA graphs: {why}", stacklevel=2)


def cuda_recorder(device: torch.device) -> Recorder | None:
    """Records CUDA graphs on a GPU, which share their memory as none leaves anything in it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], None]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()  # libraries set themselves up in it
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread, as the trainer's, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return record
