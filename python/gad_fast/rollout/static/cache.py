"""Keys and values of all rows: memory taken once, written in place, read through views.

Shapes: R rows of the cache, N active ones, C columns (tokens of the longest sequence).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from gad_fast.errors import EngineError

KEPT_FREE = 0.1
"""Share of the free memory that the cache leaves to the forward pass."""


class Place(NamedTuple):
    """Where a decode step writes, and how much of the cache it reads."""

    rows: Tensor
    """int64 [N], 0 to N - 1."""
    columns: Tensor
    """int64 [N], the position of the new token in each row."""
    width: int
    """Columns up to the last of them."""


class RowCache(Cache):
    """A cache for decode steps of one token a row, each row at a position of its own."""

    def __init__(self, like: DynamicCache, *, num_rows: int, num_columns: int) -> None:
        self._layers = [
            _RowLayer(layer, num_rows=num_rows, num_columns=num_columns) for layer in like.layers
        ]
        super().__init__(layers=list(self._layers))

    def go_to(self, place: Place) -> None:
        """Says where the next step writes."""
        for layer in self._layers:
            layer.place = place

    def fill(self, row: int, prefill: DynamicCache, index: int, length: int) -> None:
        """Takes over the first `length` tokens of row `index` of another cache."""
        for ours, theirs in zip(self._tensors(), _tensors(prefill), strict=True):
            ours[row, :, :length] = theirs[index, :, :length]

    def copy(self, source: int, row: int, length: int) -> None:
        """Copies the first `length` tokens of a row."""
        if source != row:
            for tensor in self._tensors():
                tensor[row, :, :length] = tensor[source, :, :length]

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self._layers:
            yield from layer.memory


class _RowLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, like: Any, *, num_rows: int, num_columns: int) -> None:
        super().__init__()
        # Zeros, as a masked value takes part in a product: a NaN there would spread.
        self.memory = tuple(_zeros(t, num_rows, num_columns) for t in (like.keys, like.values))
        self.is_initialized = True
        self.place: Place | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes a token of each row, [N, heads, 1, width]; gives views of all so far."""
        del args, kwargs
        rows, columns, width = self._at()
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[rows, :, columns] = states[:, :, 0].to(memory.dtype)
        keys, values = (memory[: len(rows), :, :width] for memory in self.memory)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and where they start."""
        return self._at().width - 1 + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before the new token, of the longest row."""
        return self._at().width - 1

    def get_max_length(self) -> int:
        """Columns in all."""
        return self.memory[0].shape[2]

    def _at(self) -> Place:
        assert self.place is not None
        return self.place


def require_memory(like: DynamicCache, *, num_rows: int, num_columns: int) -> None:
    """Raises EngineError, with the number of rows that fit, when memory for them is not free."""
    bytes_a_row = num_columns * sum(
        tensor[0, :, 0].numel() * _product_dtype(tensor).itemsize for tensor in _tensors(like)
    )
    free = _free_bytes(next(_tensors(like)).device) * (1 - KEPT_FREE)
    if num_rows * bytes_a_row > free:
        rows = int(free // bytes_a_row)
        raise EngineError(
            f"{num_rows} rollouts of {num_columns} tokens need {num_rows * bytes_a_row / 2**30:.1f}"
            f" GiB of cache, but {free / 2**30:.1f} GiB are free: {rows} rollouts fit "
            f"(set rollout.max_sequences = {max(rows, 1)})"
        )


def _tensors(cache: DynamicCache) -> Iterator[Tensor]:
    layer: Any
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _zeros(like: Tensor, num_rows: int, num_columns: int) -> Tensor:
    shape = (num_rows, like.shape[1], num_columns, like.shape[3])
    return like.new_zeros(shape, dtype=_product_dtype(like))


def _product_dtype(like: Tensor) -> torch.dtype:
    """What attention multiplies in: under autocast, not what a layer hands over."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
