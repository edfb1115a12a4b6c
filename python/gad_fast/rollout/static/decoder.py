"""The student's forward passes while it samples: prompts into the cache, then a token a row.

Shapes: N active rows, P tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gad_fast.records import Ids
from gad_fast.rollout.static.attention import decode_attention, takes_boolean_masks
from gad_fast.rollout.static.cache import Place, RowCache
from gad_fast.rollout.static.scheduler import Entry

PREFILL_TOKENS = 8192
"""At most so many tokens of prompts, padding included, in one forward pass."""


class Decoder:
    """A model with a cache of rows."""

    def __init__(self, model: PreTrainedModel, cache: RowCache, device: torch.device) -> None:
        self._model, self._cache, self._device = model, cache, device

    def enter(self, entries: Sequence[Entry]) -> None:
        """Gives rollouts the keys and values of their prompts, all but the last token's."""
        new = [e for e in entries if e.source is None and e.rollout.num_prefix]
        new.sort(key=lambda entry: entry.rollout.num_prefix)
        for batch in _prefill_batches(new):
            prompts = [entry.rollout.request.prompt_ids[:-1] for entry in batch]
            prefill = prefill_cache(self._model, prompts, self._device)
            for index, entry in enumerate(batch):
                self._cache.fill(entry.row, prefill, index, entry.rollout.num_prefix)
        for entry in entries:
            if entry.source is not None:
                self._cache.copy(entry.source, entry.row, entry.rollout.num_prefix)

    def step(self, inputs: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Logits [N, V] after one more token of each row."""
        width = int(positions.max()) + 1
        columns = torch.from_numpy(positions).to(self._device)
        self._cache.go_to(Place(torch.arange(len(inputs), device=self._device), columns, width))
        is_seen = torch.arange(width, device=self._device) <= columns[:, None]
        model: Any = self._model
        with torch.no_grad(), decode_attention(self._model):
            output = model(
                input_ids=torch.from_numpy(inputs).to(self._device)[:, None],
                attention_mask=_mask(self._model, is_seen)[:, None, None],
                position_ids=columns[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[:, -1]

    def move(self, source: int, row: int, length: int) -> None:
        """Puts a row's first `length` tokens into another."""
        self._cache.copy(source, row, length)


def prefill_cache(
    model: PreTrainedModel, prompts: Sequence[Ids], device: torch.device
) -> DynamicCache:
    """Keys and values of prompts, padded on the right, where causal attention never looks."""
    ids = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    cache = DynamicCache()
    language_model: Any = model
    with torch.no_grad():
        language_model(
            input_ids=torch.from_numpy(ids).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache


def _prefill_batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Consecutive entries, shortest prompt first, within the budget where one alone is."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and (len(batch) + 1) * entry.rollout.num_prefix > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _mask(model: PreTrainedModel, is_seen: Tensor) -> Tensor:
    """Boolean for scaled_dot_product_attention, to be added to the scores for any other."""
    if takes_boolean_masks(model):
        return is_seen
    lowest = torch.finfo(torch.float32).min
    return torch.zeros_like(is_seen, dtype=torch.float32).masked_fill(~is_seen, lowest)
