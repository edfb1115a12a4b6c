"""Groups of a micro-batch laid out for one forward pass, in one of two ways.

`SharedPrompts` has a row for each group, `[prompt][response 1]...[response n]`: the prompt is read
once, and every response sees the prompt and itself. It is exact for models that take a mask and
positions as they are given (shared_prompts.py finds out), and costs P + n R tokens a group.
`PaddedBatch` has a row for each response and repeats the prompt, n (P + R) tokens, for all models.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gad_fast.records import Ids, Response


class Item(NamedTuple):
    """A prompt and responses to it."""

    prompt_ids: Ids
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class Batch(ABC):
    """N responses in a forward pass, in the order of the items and of the responses in each."""

    input_ids: Tensor
    """int64 [rows, columns]."""
    attention_mask: Tensor
    position_ids: Tensor
    """int64 [rows, columns], counted from the first token of each sequence."""
    lengths: Tensor
    """int64 [N], tokens of each response."""

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of the model: ids, mask and positions."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """int64 [T], the tokens of all responses, laid end to end."""

    @abstractmethod
    def predictors(self, hidden: Tensor) -> Tensor:
        """Of hidden states [rows, columns, D] the ones [T, D] that predict the labels."""

    @abstractmethod
    def last_tokens(self, hidden: Tensor) -> Tensor:
        """Of hidden states [rows, columns, D] the ones [N, D] at each response's last token."""


@dataclass(frozen=True, slots=True)
class PaddedBatch(Batch):
    """A row for each response, prompts padded on the left and responses on the right.

    All responses start in the same column. The mask is int64 [N, P + R], 1 at real tokens.
    """

    prompt_width: int
    """P, columns of the longest prompt."""

    @property
    def labels(self) -> Tensor:
        """As in `Batch`."""
        return self.input_ids[:, self.prompt_width :][self._response_mask]

    def predictors(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        # The column before the first response token predicts it; the last predicts nothing.
        return hidden[:, self.prompt_width - 1 : -1][self._response_mask]

    def last_tokens(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, self.prompt_width + self.lengths - 1]

    @property
    def _response_mask(self) -> Tensor:
        return self.attention_mask[:, self.prompt_width :].bool()


@dataclass(frozen=True, slots=True)
class SharedPrompts(Batch):
    """A row for each group, padded on the right; every response goes on where the prompt ended.

    The mask is boolean [B, 1, L, L]: which tokens a token sees. Indices are into flattened rows.
    """

    label_index: Tensor
    """int64 [T], where the response tokens are."""
    predictor_index: Tensor
    """int64 [T], where the token before each response token is."""
    last_index: Tensor
    """int64 [N], where each response ends."""

    @property
    def labels(self) -> Tensor:
        """As in `Batch`."""
        return self.input_ids.flatten()[self.label_index]

    def predictors(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        return hidden.flatten(0, 1)[self.predictor_index]

    def last_tokens(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        return hidden.flatten(0, 1)[self.last_index]


def pad(items: Sequence[Item], *, pad_id: int, device: torch.device) -> PaddedBatch:
    """Lays out a row for each response, as a rectangle of the longest prompt and response."""
    rows = [(item.prompt_ids, response) for item in items for response in item.responses]
    lengths = np.array([len(response) for _, response in rows])
    prompt_width = max(len(prompt) for prompt, _ in rows)
    shape = (len(rows), prompt_width + int(lengths.max()))
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, (prompt, response) in enumerate(rows):
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


def share_prompts(items: Sequence[Item], *, pad_id: int, device: torch.device) -> SharedPrompts:
    """Lays out a row for each item, with its prompt once."""
    widths = [len(item.prompt_ids) + sum(map(len, item.responses)) for item in items]
    shape = (len(items), max(widths))
    ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    # Padding is a segment of its own: nobody sees it, and it sees itself.
    segments = np.full(shape, -1, dtype=np.int64)
    labels: list[NDArray[np.int64]] = []
    predictors: list[NDArray[np.int64]] = []
    for row, item in enumerate(items):
        P, width, first = len(item.prompt_ids), widths[row], row * shape[1]
        lengths = [len(response) for response in item.responses]
        starts = np.cumsum([P, *lengths])
        ids[row, :width] = np.concatenate([item.prompt_ids, *(r.ids for r in item.responses)])
        positions[row, :width] = np.concatenate(
            [np.arange(P), *(np.arange(P, P + length) for length in lengths)]
        )
        segments[row, :width] = np.repeat(np.arange(1 + len(lengths)), [P, *lengths])
        columns = [first + np.arange(*ends) for ends in itertools.pairwise(starts)]
        labels += columns
        # The first token of a response is predicted by the last of the prompt.
        predictors += [np.append(first + P - 1, response[:-1]) for response in columns]

    def on_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return SharedPrompts(
        input_ids=on_device(ids),
        attention_mask=_visible(on_device(segments)),
        position_ids=on_device(positions),
        lengths=on_device(np.array([len(columns) for columns in labels])),
        label_index=on_device(np.concatenate(labels)),
        predictor_index=on_device(np.concatenate(predictors)),
        last_index=on_device(np.array([columns[-1] for columns in labels])),
    )


def _visible(segments: Tensor) -> Tensor:
    """Boolean [B, 1, L, L] from segments [B, L]: earlier tokens of the prompt and of one's own."""
    L = segments.shape[1]
    order = torch.arange(L, device=segments.device)
    is_earlier = order[:, None] >= order[None, :]
    is_own = segments[:, :, None] == segments[:, None, :]
    is_prompt = (segments == 0)[:, None, :] & (segments >= 0)[:, :, None]
    return (is_earlier & (is_own | is_prompt))[:, None]
