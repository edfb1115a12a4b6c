"""The torch path of the linear operations, and the products that both paths end in.

Tokens are worked on in blocks, and in the kernels' backward pass the vocabulary in slices, so that
no more than one block of one slice of the logits' gradient dZ is ever there:

    dX = sum over slices of dZ W      dW = sum over blocks of dZ^T X      db = sum over rows of dZ

A slice of dW that is done in one block is one product, rounded once. Other sums are kept wide.

Shapes: T tokens, C tokens of a block, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.arguments import compute_dtype
from gad_fast.kernels.chunked_torch import (
    RowStatistics,
    torch_logprobs,
    torch_logprobs_backward,
)
from gad_fast.kernels.linear_head import LinearHead
from gad_fast.kernels.linear_tiles import RowStats


def torch_linear_stats(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    inverse_temperature: Tensor,
    *,
    logits_dtype: str,
    has_entropy: bool,
) -> RowStats:
    """What a loss needs of each row [C]; the entropy is 0 where it is not asked for."""
    logits = head.logits(hidden, logits_dtype)  # [C, V]
    scaling = head.scaling(inverse_temperature)
    logp, statistics = torch_logprobs(logits, labels, scaling, None, has_entropy)
    entropy = statistics.entropy if has_entropy else torch.zeros_like(logp)
    return RowStats(logp, entropy, statistics.maximum, statistics.log_total)


def torch_linear_grad(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    inverse_temperature: Tensor,
    stats: RowStats,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    *,
    logits_dtype: str,
) -> Tensor:
    """Gradient of the logits [C, V], in the dtype of the hidden states; arguments as above."""
    logits = head.logits(hidden, logits_dtype)
    is_same = logits.dtype == hidden.dtype
    grad_logits = logits if is_same else torch.empty_like(logits, dtype=hidden.dtype)
    torch_logprobs_backward(
        logits,
        labels,
        head.scaling(inverse_temperature),
        None,
        RowStatistics(*stats[1:]),
        grad_logp,
        grad_entropy,
        grad_logits,
    )
    return grad_logits


_PRODUCT_ROWS = 4096


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """Gradients of hidden states [T, D], weight [V, D] and bias [V]; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    needs: Needs,
    grad_logits: Callable[[slice, slice], Tensor],
    blocks: list[slice],
    slices: list[slice],
    *,
    weight_dtype: torch.dtype,
    accum_dtype: torch.dtype,
) -> HeadGradients:
    """Gradients from those of the logits, which are asked for one block and slice at a time.

    Args:
        hidden: `[T, D]`.
        weight: `[V, D]`, in the dtype of the hidden states.
        needs: the gradients wanted; the products for the others are left out.
        grad_logits: gives dZ of rows and columns.
        blocks: of the rows.
        slices: of the columns.
        weight_dtype: of dW, where it needs no sum over blocks.
        accum_dtype: of that sum; float64 stays float64.

    Returns:
        Gradients in whatever dtype they were summed in: the caller's to convert.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    wide = compute_dtype(hidden.dtype)
    sum_dtype = wide if wide == torch.float64 else accum_dtype
    num_blocks, num_slices = len(blocks), len(slices)
    grad_hidden = hidden.new_empty(
        (T, D) if needs.hidden else 0, dtype=wide if num_slices > 1 else hidden.dtype
    )
    grad_weight = weight.new_empty(
        (V, D) if needs.weight else 0, dtype=sum_dtype if num_blocks > 1 else weight_dtype
    )
    grad_bias = weight.new_zeros(V if needs.bias else 0, dtype=wide)
    for rows in blocks:
        for columns in slices:
            dz = grad_logits(rows, columns)
            if needs.hidden:
                _sum_product(grad_hidden[rows], dz, weight[columns], is_first=columns.start == 0)
            if needs.weight:
                _sum_product(grad_weight[columns], dz.t(), hidden[rows], is_first=rows.start == 0)
            if needs.bias:
                grad_bias[columns] += dz.sum(0, dtype=wide)
            del dz  # else there would be two while the next is made
    return HeadGradients(grad_hidden, grad_weight, grad_bias)


def _sum_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """Makes the total a b, or adds a b to it; what it held before the first may be anything."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0.0 if is_first else 1.0)
    elif a.is_cuda and a.dtype == torch.bfloat16 and total.dtype == torch.float32:
        if is_first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        # In parts, because a whole product beside the total would be half as large again.
        for rows in even_slices(a.shape[0], _PRODUCT_ROWS):
            product = torch.mm(a[rows], b)
            total[rows].copy_(product) if is_first else total[rows].add_(product)


def even_slices(size: int, limit: int, multiple: int = 1) -> list[slice]:
    """Cuts [0, size) into as few parts as the limit allows, about equal, and multiples but for one.

    A limit below `multiple` counts as that. Nothing is cut into one empty part.
    """
    limit = max(1, limit // multiple) * multiple
    num_parts = max(1, -(-size // limit))
    length = -(-size // (num_parts * multiple)) * multiple
    return [
        slice(start, min(start + length, size)) for start in range(0, max(1, size), max(1, length))
    ]
