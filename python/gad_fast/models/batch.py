"""Prompts and responses as one padded rectangle, ready for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gad_fast.records import Ids, Response


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """N sequences, prompts padded on the left and responses on the right.

    All responses start in the same column, so that a model computes logits for the last columns
    only. Positions count from each sequence's first real token: padding changes no score.
    """

    input_ids: Tensor
    """int64 [N, P + R]."""
    attention_mask: Tensor
    """int64 [N, P + R], 1 at real tokens."""
    position_ids: Tensor
    """int64 [N, P + R]."""
    lengths: Tensor
    """int64 [N], tokens of each response."""
    prompt_width: int
    """P, columns of the longest prompt."""

    @property
    def response_ids(self) -> Tensor:
        """int64 [N, R]."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """Boolean [N, R], true at response tokens, the end token included."""
        return self.attention_mask[:, self.prompt_width :].bool()

    @property
    def last_columns(self) -> Tensor:
        """int64 [N], column of the last token of each response."""
        return self.prompt_width + self.lengths - 1


def pad(
    prompts: Sequence[Ids], responses: Sequence[Response], *, pad_id: int, device: torch.device
) -> PaddedBatch:
    """Lays out sequences as a rectangle of the longest prompt and the longest response."""
    lengths = np.array([len(response) for response in responses])
    prompt_width = max(len(prompt) for prompt in prompts)
    shape = (len(prompts), prompt_width + int(lengths.max()))
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = prompt_width - len(prompt), prompt_width + len(response)
        ids[row, start:prompt_width], ids[row, prompt_width:end] = prompt, response.ids
        mask[row, start:end] = 1
    attention_mask = torch.from_numpy(mask)
    return PaddedBatch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=attention_mask.to(device),
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp_min(0).to(device),
        lengths=torch.from_numpy(lengths).to(device),
        prompt_width=prompt_width,
    )
