"""Keys and values of all rows: memory taken once, written in place, read through views.

Shapes: R rows of the cache, N rows of a forward pass, C columns (tokens of the longest sequence).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from gad_fast.rollout.room import keys_and_values, product_dtype


class Place(NamedTuple):
    """Where a forward pass writes, and how much of the cache it reads."""

    rows: Tensor
    """int64 [N]; 0 to N - 1 in a decode step."""
    columns: Tensor | None
    """int64 [N], of the new token of each row; None where prompts are read from column 0 on."""
    width: int
    """Columns that a decode step sees, of them the last one new; 1 for prompts."""


class RowCache(Cache):
    """A cache in which each row is at a position of its own."""

    def __init__(self, like: DynamicCache, *, num_rows: int, num_columns: int) -> None:
        self.parts = [RowLayer(pair, num_rows, num_columns) for pair in keys_and_values(like)]
        super().__init__(layers=list(self.parts))

    def go_to(self, place: Place) -> None:
        """Says where the next forward pass writes."""
        for layer in self.parts:
            layer.place = place

    def copy(self, source: int, row: int, length: int) -> None:
        """Copies the first `length` tokens of a row."""
        if source != row:
            for layer in self.parts:
                for memory in layer.memory:
                    memory[row, :, :length] = memory[source, :, :length]


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer."""

    is_sliding = False

    def __init__(self, like: tuple[Tensor, Tensor], num_rows: int, num_columns: int) -> None:
        super().__init__()
        # Zeros, as a masked value takes part in a product: a NaN there would spread.
        self.memory = [
            t.new_zeros((num_rows, t.shape[1], num_columns, t.shape[3]), dtype=product_dtype(t))
            for t in like
        ]
        self.is_initialized = True
        self.place = Place(torch.empty(0), None, 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new tokens, [N, heads, tokens, width]; gives all that the rows' tokens see."""
        del args, kwargs
        keys, values = self.memory
        return self._write(keys, key_states), self._write(values, value_states)

    def _write(self, memory: Tensor, states: Tensor) -> Tensor:
        rows, columns, width = self.place
        if columns is None:
            memory[rows, :, : states.shape[2]] = states.to(memory.dtype)
            return states
        memory[rows, :, columns] = states[:, :, 0].to(memory.dtype)
        return memory[: len(rows), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and where they start."""
        return self.place.width - 1 + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before the new tokens, of the longest row."""
        return self.place.width - 1

    def get_max_length(self) -> int:
        """Columns in all."""
        return self.memory[0].shape[2]
