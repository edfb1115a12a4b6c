"""Groups of a micro-batch laid out for one forward pass, in one of two ways.

`SharedPrompts` lays groups end to end, each as `[prompt][response 1]...[response n]`: the prompt is
read once, every response sees the prompt and itself, and nothing is padded. It is exact for models
that take attention and positions as they are given (shared_prompts.py finds out), and costs P + n R
tokens a group. `PaddedBatch` has a row for each response and repeats the prompt, n (P + R) tokens
and padding, for all models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gad_fast.models.attention import rows_as_mask
from gad_fast.records import Ids, Response


class Item(NamedTuple):
    """A prompt and responses to it."""

    prompt_ids: Ids
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class Batch(ABC):
    """N responses in a forward pass, in the order of the items and of the responses in each."""

    input_ids: Tensor
    """int64 [rows, columns]; one row where prompts are shared."""
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
    """Groups end to end, in one row of T tokens in all; nothing is padded.

    The mask says which tokens attend to each other (attention.rows_as_mask).
    """

    label_index: Tensor
    """int64 [R], where the response tokens are, R of all responses together."""
    predictor_index: Tensor
    """int64 [R], where the token before each response token is."""
    last_index: Tensor
    """int64 [N], where each response ends."""

    @property
    def labels(self) -> Tensor:
        """As in `Batch`."""
        return self.input_ids[0, self.label_index]

    def predictors(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        return hidden[0, self.predictor_index]

    def last_tokens(self, hidden: Tensor) -> Tensor:
        """As in `Batch`."""
        return hidden[0, self.last_index]


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


def share_prompts(items: Sequence[Item], *, device: torch.device) -> SharedPrompts:
    """Lays out the items end to end, each with its prompt once."""
    ids = [part for item in items for part in (item.prompt_ids, *(r.ids for r in item.responses))]
    spans = list(_spans(items))

    def on_device(parts: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return SharedPrompts(
        input_ids=on_device([part.astype(np.int64) for part in ids])[None],
        attention_mask=rows_as_mask(*(rows.to(device) for rows in _rows(spans))),
        position_ids=on_device(list(_positions(spans)))[None],
        lengths=on_device([np.array([len(span.response) for span in spans])]),
        label_index=on_device([span.response for span in spans]),
        # The first token of a response is predicted by the last of the prompt.
        predictor_index=on_device(
            [np.append(span.prompt[-1], span.response[:-1]) for span in spans]
        ),
        last_index=on_device([np.array([span.response[-1] for span in spans])]),
    )


class _Span(NamedTuple):
    """Where the tokens of a response, and of its prompt, are among those of all items."""

    prompt: NDArray[np.int64]
    response: NDArray[np.int64]
    is_first: bool
    """Of its prompt."""


def _spans(items: Sequence[Item]) -> Iterator[_Span]:
    end = 0
    for item in items:
        prompt = np.arange(end, end := end + len(item.prompt_ids))
        for index, response in enumerate(item.responses):
            yield _Span(prompt, np.arange(end, end := end + len(response)), index == 0)


def _positions(spans: Sequence[_Span]) -> Iterator[NDArray[np.int64]]:
    """Of all tokens in their sequences, a piece for each prompt and response."""
    for prompt, response, is_first in spans:
        if is_first:
            yield np.arange(len(prompt))
        yield np.arange(len(prompt), len(prompt) + len(response))


def _rows(spans: Sequence[_Span]) -> tuple[Tensor, Tensor]:
    """Arguments of `rows_as_mask`."""
    rows = [np.append(span.prompt, span.response) for span in spans]
    tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = own
    # A prompt is in the rows of all its responses; what attention gives for it is the same in each.
    _, places = np.unique(np.concatenate(rows), return_index=True)
    starts = np.cumsum([0, *map(len, rows)])
    row = np.searchsorted(starts, places, side="right") - 1
    return torch.from_numpy(tokens), torch.from_numpy(row * tokens.shape[1] + places - starts[row])
