"""Rows of logits in torch: what runs on a CPU, and wherever Triton cannot.

The maths is that of token_logprobs.py. Rows are worked on in chunks that stay in cache, so that no
[T, V] intermediate is made; the result does not depend on the chunk. Autograd over log_softmax
would hold an fp32 [T, V] copy, and several for the entropy.

Shapes: T tokens, V vocabulary, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.arguments import compute_dtype

# Rows are worked on in chunks of this size, so that each pass over a chunk finds it in cache.
_CHUNK_BYTES = 2 << 20
# exp() of anything lower is exactly 0, in float64 too, so that clamping there changes no product
# p * log p but 0 * -inf.
LOWEST_LOG_P = -1000.0


class Scaling(NamedTuple):
    """What makes z of a logit x; in the order in which the operations take it."""

    inverse_temperature: Tensor
    """[T]."""
    logit_scale: float
    softcap: float | None

    def of(self, rows: slice) -> "Scaling":
        """The scaling of some of the rows."""
        return self._replace(inverse_temperature=self.inverse_temperature[rows])

    def factor(self) -> Tensor:
        """[T, 1], by which `capped` values become z."""
        scale = self.logit_scale if self.softcap is None else 1.0
        return scale * self.inverse_temperature[:, None]

    def capped(self, x: Tensor) -> Tensor:
        """The logits themselves, or under a cap softcap * tanh(logit_scale * x / softcap)."""
        if self.softcap is None:
            return x
        return (x * (self.logit_scale / self.softcap)).tanh_().mul_(self.softcap)

    def cap_(self, x: Tensor) -> Tensor | None:
        """Makes `capped` values of logits in place; the cap's derivative, where there is one."""
        if self.softcap is None:
            return None
        x.mul_(self.logit_scale / self.softcap).tanh_()
        derivative = 1 - x.square()
        x *= self.softcap
        return derivative

    def slope(self) -> Tensor:
        """Derivative [T] of z by its logit, but for that of the cap."""
        return self.logit_scale * self.inverse_temperature

    def slope_(self, values: Tensor) -> Tensor:
        """Derivative of `capped`, from and over its values."""
        assert self.softcap is not None
        squares = values.div_(self.softcap).square_()
        return squares.neg_().add_(1.0).mul_(self.logit_scale)


class RowStatistics(NamedTuple):
    """What the backward pass needs to know of a row beside its logits, each [T]."""

    entropy: Tensor
    """Or [0], where nobody asked for it."""
    maximum: Tensor
    """Of the capped logits."""
    log_total: Tensor
    """Log of the sum of exp(z - max z); its base is the backend's own."""

    def of(self, rows: slice) -> "RowStatistics":
        """Those of some of the rows."""
        return RowStatistics(*(values[rows] for values in self))


def empty_statistics(logits: Tensor, has_entropy: bool) -> RowStatistics:
    """Room for the statistics of logits [T, V], in float32 or float64."""

    def empty(T: int) -> Tensor:
        return torch.empty(T, dtype=compute_dtype(logits.dtype), device=logits.device)

    T = logits.shape[0]
    return RowStatistics(empty(T if has_entropy else 0), empty(T), empty(T))


def row_chunks(logits: Tensor) -> list[slice]:
    """Rows of [T, V] in runs that stay in cache."""
    T, V = logits.shape
    num_rows = max(1, _CHUNK_BYTES // (V * compute_dtype(logits.dtype).itemsize))
    return [slice(start, start + num_rows) for start in range(0, T, num_rows)]


def kept_rows(logits: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
    """Some of the rows in float32 or float64, [C, V], with zeros for what the mask leaves out."""
    x = logits[rows].to(compute_dtype(logits.dtype))
    return x if mask is None else x.masked_fill(~mask[rows, None], 0.0)


def row_statistics(
    x: Tensor, labels: Tensor, scaling: Scaling, has_entropy: bool
) -> tuple[Tensor, RowStatistics]:
    """Log-probabilities [C], NaN for a label outside [0, V), and statistics of x [C, V]."""
    values = scaling.capped(x)
    maximum = values.amax(-1)
    z = (values - maximum[:, None]).mul_(scaling.factor())
    e = z.exp()
    total = e.sum(-1)
    log_total = total.log()
    index = labels.clamp(0, x.shape[1] - 1)
    logp = z.gather(-1, index[:, None]).squeeze(-1) - log_total
    logp.masked_fill_(index != labels, torch.nan)
    entropy = x.new_empty(0)
    if has_entropy:
        e *= z.clamp_(min=LOWEST_LOG_P)
        entropy = log_total - e.sum(-1) / total
    return logp, RowStatistics(entropy, maximum, log_total)


def row_gradient(
    x: Tensor,
    labels: Tensor,
    scaling: Scaling,
    statistics: RowStatistics,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient of x [C, V], a new tensor, from those of the log-probabilities and entropies [C]."""
    values, factor = scaling.capped(x), scaling.factor()
    log_p = (values - statistics.maximum[:, None]).mul_(factor)
    log_p -= statistics.log_total[:, None]
    grad = log_p.exp()
    grad_label = grad_logp[:, None] * factor
    if grad_entropy is None:
        grad *= -grad_label
    else:
        surprise = log_p.clamp_(min=LOWEST_LOG_P).add_(statistics.entropy[:, None])
        grad *= surprise.mul_(-grad_entropy[:, None] * factor).sub_(grad_label)
    grad.scatter_add_(-1, labels.clamp(0, x.shape[1] - 1)[:, None], grad_label)
    return grad if scaling.softcap is None else grad.mul_(scaling.slope_(values))


def torch_logprobs(
    logits: Tensor, labels: Tensor, scaling: Scaling, mask: Tensor | None, has_entropy: bool
) -> tuple[Tensor, RowStatistics]:
    """Log-probabilities [T] and statistics of logits [T, V]; outside the mask logp and H are 0."""
    statistics = empty_statistics(logits, has_entropy)
    logp = torch.empty_like(statistics.maximum)
    for rows in row_chunks(logits):
        x = kept_rows(logits, rows, mask)
        logp[rows], of_rows = row_statistics(x, labels[rows], scaling.of(rows), has_entropy)
        for whole, part in zip(statistics, of_rows, strict=True):
            whole[rows] = part
    if mask is not None:
        logp.masked_fill_(~mask, 0.0)
        if has_entropy:
            statistics.entropy.masked_fill_(~mask, 0.0)
    return logp, statistics


def torch_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    scaling: Scaling,
    mask: Tensor | None,
    statistics: RowStatistics,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """Writes the gradient [T, V], which may be over the logits; exactly 0 outside the mask."""
    if grad_logp is None:
        grad_logp = torch.zeros_like(statistics.maximum)
    if mask is not None:
        grad_logp = grad_logp.where(mask, 0.0)
        grad_entropy = None if grad_entropy is None else grad_entropy.where(mask, 0.0)
    for rows in row_chunks(logits):
        grad_logits[rows] = row_gradient(
            kept_rows(logits, rows, mask),
            labels[rows],
            scaling.of(rows),
            statistics.of(rows),
            grad_logp[rows],
            None if grad_entropy is None else grad_entropy[rows],
        )


def scale_in_torch(gradient: Tensor, factor: Tensor, scaled: Tensor) -> None:
    """Writes gradient [T, V] times factor [] into `scaled`, which may be the gradient."""
    for rows in row_chunks(gradient):
        scaled[rows] = gradient[rows].to(compute_dtype(gradient.dtype)) * factor
