"""Draws a token for each row, with one random number that depends on nothing but the rollout.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gad_fast.rollout.engine import Sampling

_BLOCKS = range(512, 63, -1)


def draw(logits: Tensor, sampling: Sampling, numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """A token of each row, int64 [N], and its log-probability, Float32 [N].

    Args:
        logits: [N, V].
        sampling: temperature, top-k and top-p.
        numbers: one in [0, 1) for each row; not used at temperature 0.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        chosen = logits.gather(-1, tokens[:, None])[:, 0].float()
        return tokens, chosen - logits.float().logsumexp(-1)
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    p = _cut(scaled.softmax(-1), sampling)
    return inverse_cdf(p, torch.from_numpy(numbers).to(p.device))


def inverse_cdf(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of p passes u times the whole, and its log-probability.

    In two levels, a block of tokens and then a token in it: a running sum over the whole vocabulary
    is several times slower, and in float32 would round small probabilities away.

    Args:
        p: Float32 [N, V], probabilities up to a factor for each row.
        u: Float64 [N], in [0, 1).
    """
    blocks = _in_blocks(p)
    sums = blocks.sum(-1).double().cumsum(-1)
    target = u[:, None] * sums[:, -1:]
    block = _first_over(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(p), device=p.device)
    inner = blocks[rows, block[:, 0]].double().cumsum(-1)
    token = block * blocks.shape[-1] + _first_over(inner, target - before)
    token.clamp_(max=p.shape[-1] - 1)
    chosen = p.gather(1, token).double() / sums[:, -1:]
    return token[:, 0], chosen[:, 0].log().float()


def _first_over(sums: Tensor, target: Tensor) -> Tensor:
    """Where running sums pass a target; never at a summand of zero, however sums are rounded."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(sums, target, right=True), last)
    # Where sums are not numbers there is no such place; the log-probability then tells.
    return found.clamp_(max=sums.shape[-1] - 1)


def _in_blocks(p: Tensor) -> Tensor:
    size = p.shape[-1]
    width = next((width for width in _BLOCKS if size % width == 0), None)
    if width is None:
        width = 256
        p = functional.pad(p, (0, -size % width))
    return p.view(len(p), -1, width)


def _cut(p: Tensor, sampling: Sampling) -> Tensor:
    """Zeros where top-k or top-p leave a token out."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    is_kept = ordered.cumsum(-1) - ordered < sampling.top_p
    if sampling.top_k:
        is_kept[:, sampling.top_k :] = False
    return torch.zeros_like(p).scatter(-1, order, torch.where(is_kept, ordered, 0.0))
