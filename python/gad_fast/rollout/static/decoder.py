"""The student's forward passes while it samples: prompts into the cache, then a token a row.

Shapes: N active rows, R rows of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from gad_fast import _core
from gad_fast.models.decode_attention import decode_attention, takes_boolean_masks
from gad_fast.rollout.static.cache import Place, RowCache
from gad_fast.rollout.static.graphs import Graphs, Recorder, Size
from gad_fast.rollout.static.scheduler import Entry

PREFILL_TOKENS = 8192
"""At most so many tokens of prompts, padding included, in one forward pass."""


class Decoder:
    """A model with a cache of rows."""

    def __init__(
        self, model: PreTrainedModel, cache: RowCache, largest: Size, recorder: Recorder | None
    ) -> None:
        device = model.device
        self._model, self._cache, self._largest = model, cache, largest
        self._rows = torch.arange(largest.rows, device=device)
        self._inputs = torch.zeros(2, largest.rows, dtype=torch.int64, device=device)
        self._graphs = Graphs(recorder, largest, self._decode)

    def enter(self, entries: Sequence[Entry]) -> None:
        """Gives rollouts the keys and values of their prompts, all but the last token's."""
        new = [e for e in entries if e.source is None and e.rollout.num_prefix]
        lengths = np.array([entry.rollout.num_prefix for entry in new], dtype=np.int64)
        budget = max([PREFILL_TOKENS, *lengths.tolist()])
        one, none = np.ones_like(lengths), np.zeros_like(lengths)
        for part in _core.plan_micro_batches(one, lengths, none, token_budget=budget):
            self._read_prompts([new[index] for index in part])
        for entry in entries:
            if entry.source is not None:
                self.move(entry.source, entry.row, entry.rollout.num_prefix)

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Logits [N, V] after one more token of each row; they hold until the next step."""
        size = self._graphs.size(len(tokens), int(positions.max()) + 1)
        # Rows beyond the active ones write to the last column, where no prompt is.
        inputs = np.full((2, size.rows), self._largest.width - 1)
        inputs[:, : len(tokens)] = tokens, positions
        inputs[0, len(tokens) :] = 0
        self._inputs[:, : size.rows] = torch.from_numpy(inputs).to(self._inputs.device)
        return self._graphs.logits(size)[: len(tokens)]

    def move(self, source: int, row: int, length: int) -> None:
        """Puts a row's first `length` tokens into another."""
        self._cache.copy(source, row, length)

    def _read_prompts(self, entries: Sequence[Entry]) -> None:
        """Padded on the right: causal attention never looks there, and steps write over it."""
        prompts = [entry.rollout.request.prompt_ids[:-1] for entry in entries]
        ids = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        rows = self._rows[torch.tensor([entry.row for entry in entries])]
        self._cache.go_to(Place(rows, None, 1))
        self._forward(input_ids=torch.from_numpy(ids).to(rows.device))

    def _decode(self, size: Size) -> Tensor:
        tokens, columns = self._inputs[:, : size.rows]
        self._cache.go_to(Place(self._rows[: size.rows], columns, size.width))
        is_seen = torch.arange(size.width, device=columns.device) <= columns[:, None]
        mask = is_seen
        if not takes_boolean_masks(self._model):
            mask = torch.where(is_seen, 0.0, torch.finfo(torch.float32).min)
        with decode_attention(self._model):
            return self._forward(
                input_ids=tokens[:, None],
                attention_mask=mask[:, None, None],
                position_ids=columns[:, None],
            )

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Logits [N, V] of the last column."""
        model: Any = self._model
        with torch.no_grad():
            output = model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]
