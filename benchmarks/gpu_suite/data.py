"""Random inputs as a trained model would give them: peaked, clipped on both sides, partly masked.

On flat logits a phantom token in the tail, or a rounded p - 1 at the label, is too small to be
seen; and zeros run faster than real data.

Shapes: T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_suite.scale import Scale, Shape

TEMPERATURE = 0.8
IGNORED_LABEL = -100
_LOGIT_STD = 2.0
_CHUNK = 1024


class Tokens(NamedTuple):
    """What the operations ask about tokens, each [T]."""

    labels: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    mask: Tensor | None
    num_tokens: float
    """Kept tokens of the whole call, also where these are some of them."""

    def of(self, rows: slice) -> Tokens:
        """Some of the tokens, in float64."""
        return Tokens(
            self.labels[rows],
            self.old_logp[rows].double(),
            self.ref_logp[rows].double(),
            self.advantages[rows].double(),
            None if self.mask is None else self.mask[rows],
            self.num_tokens,
        )


class Problem(NamedTuple):
    """One call's inputs: logits [T, V], or hidden states [T, D] with the head's weight [V, D]."""

    x: Tensor
    weight: Tensor | None
    tokens: Tokens


def logits_problem(shape: Shape, scale: Scale, dtype: str, *, is_masked: bool) -> Problem:
    """Logits whose label has a p between 0.3 and 0.999, two labels in three that peak."""
    generator = _generator(shape, scale)
    x = torch.empty(shape.T, shape.V, dtype=getattr(torch, dtype), device=scale.device)
    x.normal_(generator=generator).mul_(_LOGIT_STD)
    peaks = torch.randint(shape.V, (shape.T,), generator=generator, device=scale.device)
    # With values of variance s^2, log sum exp of the others is about log V + s^2 / 2.
    rest = math.log(shape.V) + (_LOGIT_STD / TEMPERATURE) ** 2 / 2
    peak = TEMPERATURE * (rest + _log_odds(shape.T, scale.device))
    x.scatter_(1, peaks[:, None], peak[:, None].to(x.dtype))
    labels = _labels(peaks, shape.V)
    logp = torch.cat([_logprobs(x[r], labels[r]) for r in _chunks(shape.T)])
    return Problem(x, None, _tokens(logp, labels, shape, generator, is_masked))


def head_problem(shape: Shape, scale: Scale, dtype: str, *, is_masked: bool) -> Problem:
    """Hidden states that point at the row of their label: the further, the more peaked."""
    assert shape.D is not None
    generator, device = _generator(shape, scale), scale.device
    weight = torch.randn(shape.V, shape.D, generator=generator, device=device)
    peaks = torch.randint(shape.V, (shape.T,), generator=generator, device=device)
    noise = torch.randn(shape.T, shape.D, generator=generator, device=device)
    rest = math.log(shape.V) + (_LOGIT_STD / TEMPERATURE) ** 2 / 2
    reach = TEMPERATURE * (rest + _log_odds(shape.T, device))[:, None]
    hidden = reach * weight[peaks] / shape.D + noise * (_LOGIT_STD / shape.D**0.5)
    weight, hidden = weight.to(getattr(torch, dtype)), hidden.to(getattr(torch, dtype))
    labels = _labels(peaks, shape.V)
    logp = torch.cat([_logprobs(hidden[r] @ weight.t(), labels[r]) for r in _chunks(shape.T)])
    return Problem(hidden, weight, _tokens(logp, labels, shape, generator, is_masked))


def make_problem(shape: Shape, scale: Scale, dtype: str, *, is_masked: bool) -> Problem:
    """The problem of a shape, with a head where it has a width."""
    make = logits_problem if shape.D is None else head_problem
    return make(shape, scale, dtype, is_masked=is_masked)


def _tokens(
    logp: Tensor, labels: Tensor, shape: Shape, generator: torch.Generator, is_masked: bool
) -> Tokens:
    def normal() -> Tensor:
        return torch.randn(shape.T, generator=generator, device=logp.device)

    mask = None
    if is_masked:
        mask = torch.arange(shape.T, device=labels.device) % 8 != 5
        labels[~mask] = IGNORED_LABEL
    num_tokens = float(shape.T if mask is None else mask.sum().item())
    old_logp = logp + 0.3 * normal()  # ratios fall outside the clip on both sides
    return Tokens(labels, old_logp, logp + 0.3 * normal(), normal(), mask, num_tokens)


def _labels(peaks: Tensor, V: int) -> Tensor:
    labels = peaks.clone()
    labels[2::3] = (labels[2::3] + 1) % V
    return labels


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.float() / TEMPERATURE
    return z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(1)


def _log_odds(T: int, device: str) -> Tensor:
    p = torch.linspace(0.3, 0.999, T, device=device)
    return torch.log(p / (1 - p))


def _chunks(T: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, T, _CHUNK)]


def _generator(shape: Shape, scale: Scale) -> torch.Generator:
    seed = shape.T * shape.V + (shape.D or 0)
    return torch.Generator(scale.device).manual_seed(seed)
