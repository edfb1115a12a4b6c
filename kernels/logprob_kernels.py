"""Triton kernels over rows of logits, and the pieces of them that other row kernels share.

The maths is in token_logprobs.py; chunked_torch.py is the same in torch.

Shapes: T tokens, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gad_fast.kernels.chunked_torch import (
    RowStatistics,
    Scaling,
    empty_statistics,
    scale_in_torch,
)
from gad_fast.kernels.optional_triton import tl, triton

# The kernels take exponentials in base 2, the one the hardware has: exp(z) = exp2(v * scale) with
# scale = log2(e) / temperature.
LN_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(math.log2(math.e))
MINUS_INFINITY = tl.constexpr(-math.inf)
_NAN = tl.constexpr(math.nan)
# Where the running maximum starts. Finite, so that a block of nothing but -inf gives exp2(-inf) = 0
# and not exp2(-inf + inf) = NaN; below any real logit, so that very negative rows do not underflow.
_LOWEST_MAXIMUM = tl.constexpr(-1e30)

MAX_FORWARD_BLOCK = 8192
MAX_BACKWARD_BLOCK = 4096
# 16 columns a thread. tests/kernels/test_ahead_of_time.py checks that they stay in registers.
_COLUMNS_PER_WARP = 512


@triton.jit
def row_scale(inverse_temperature, logit_scale, softcap):
    """What makes base-2 exponents of `capped` values: without a cap, of the logits themselves."""
    scale = inverse_temperature * _LOG2_E
    return scale * logit_scale if softcap is None else scale


@triton.jit
def capped(x, logit_scale, softcap):
    """The logits as they are, or under the cap: 2 sigmoid(2u) - 1 is tanh(u)."""
    if softcap is not None:
        x = softcap * (2.0 * tl.sigmoid(2.0 * logit_scale / softcap * x) - 1.0)
    return x


@triton.jit
def label_value(p_row, label, V, logit_scale, softcap):
    """The label's capped logit; NaN, and nothing read, for a label outside [0, V)."""
    is_inside = (label >= 0) & (label < V)
    x = tl.load(p_row + label, mask=is_inside, other=_NAN).to(tl.float32)
    return capped(x, logit_scale, softcap)


@triton.jit
def read_row(p_row, V, scale, logit_scale, softcap, EVICTION, BLOCK_V: tl.constexpr):
    """Maximum, base-2 log of the sum, and entropy of one row, in one read of it.

    The entropy is not optional: it takes a multiply-add on values already in registers, in a loop
    bound by its loads.
    """
    running_max = _LOWEST_MAXIMUM
    total = 0.0  # sum of e_j = exp2((v_j - running_max) * scale)
    weighted = 0.0  # sum of e_j * (v_j - running_max) * scale; unshifted, it would cancel in H
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        # The tail must be -inf before the maximum: as zeros it would be phantom tokens.
        b_x = tl.load(p_row + o_v, mask=m_v, other=MINUS_INFINITY, eviction_policy=EVICTION)
        b_v = capped(b_x.to(tl.float32), logit_scale, softcap)
        if softcap is not None:  # which has made something finite of it
            b_v = tl.where(m_v, b_v, MINUS_INFINITY)
        new_max = tl.maximum(running_max, tl.max(b_v, 0))
        # Subtracting before scaling keeps the difference exact however large the logits are.
        b_z = (b_v - new_max) * scale
        b_e = tl.exp2(b_z)
        b_weighted = tl.where(b_e > 0, b_e * b_z, 0.0)  # 0 * -inf is NaN
        shift = (running_max - new_max) * scale
        rescale = tl.exp2(shift)
        weighted = (weighted + shift * total) * rescale + tl.sum(b_weighted, 0)
        total = total * rescale + tl.sum(b_e, 0)
        running_max = new_max
    log2_total = tl.log2(total)
    return running_max, log2_total, (log2_total - weighted / total) * LN_2


@triton.jit
def read_token(p_row, label, V, scale, logit_scale, softcap, EVICTION, BLOCK_V: tl.constexpr):
    """Log-probability of the label, and maximum, base-2 log of the sum and entropy of its row."""
    # Before the loop, so that its latency passes while the loop runs.
    label_v = label_value(p_row, label, V, logit_scale, softcap)
    maximum, log2_total, entropy = read_row(
        p_row, V, scale, logit_scale, softcap, EVICTION, BLOCK_V
    )
    logp = ((label_v - maximum) * scale - log2_total) * LN_2
    return logp, maximum, log2_total, entropy


@triton.jit
def block_gradient(
    b_x,
    o_v,
    label,
    maximum,
    log2_total,
    entropy,
    grad_logp,
    grad_h,
    scale,
    logit_scale,
    softcap,
    HAS_ENTROPY: tl.constexpr,
):
    """Gradient of a block of logits, in fp32.

    The label's entry is finished before the one store that follows: p - 1 of a p rounded to bf16
    loses most of the gradient of a confident token.
    """
    b_v = capped(b_x.to(tl.float32), logit_scale, softcap)
    b_log2_p = (b_v - maximum) * scale - log2_total
    b_p = tl.exp2(b_log2_p)
    b_grad = grad_logp * (tl.where(o_v == label, 1.0, 0.0) - b_p)
    if HAS_ENTROPY:
        b_surprise = b_log2_p * LN_2 + entropy
        b_grad -= grad_h * tl.where(b_p > 0, b_p * b_surprise, 0.0)  # 0 * -inf is NaN
    b_grad *= scale * LN_2
    if softcap is not None:
        b_tanh = b_v * (1.0 / softcap)
        b_grad *= logit_scale * (1.0 - b_tanh * b_tanh)
    return b_grad


@triton.jit
def token_logprobs_kernel(
    logits,  # [T, V], rows `row_stride` apart
    labels,  # [T]
    inverse_temperature,  # [T]
    mask,  # bool [T], or None
    logprobs,  # [T]
    entropy,  # [T], or None
    maximum,  # [T], of the capped logits
    log2_total,  # [T], base-2 log of the sum of exp(z - max)
    row_stride,
    V,
    logit_scale,
    softcap,  # or None
    BLOCK_V: tl.constexpr,
):
    """One program a row: reads it once, or not at all outside the mask."""
    i_t = tl.program_id(0).to(tl.int64)
    is_kept = True
    if mask is not None:
        is_kept = tl.load(mask + i_t) != 0
    if is_kept == 0:
        tl.store(logprobs + i_t, 0.0)
        if entropy is not None:
            tl.store(entropy + i_t, 0.0)
        tl.store(maximum + i_t, 0.0)
        tl.store(log2_total + i_t, 0.0)
        return
    p_row = logits + i_t * row_stride
    scale = row_scale(tl.load(inverse_temperature + i_t), logit_scale, softcap)
    logp, row_maximum, row_log2_total, row_entropy = read_token(
        p_row, tl.load(labels + i_t), V, scale, logit_scale, softcap, "evict_first", BLOCK_V
    )
    tl.store(logprobs + i_t, logp)
    if entropy is not None:
        tl.store(entropy + i_t, row_entropy)
    tl.store(maximum + i_t, row_maximum)
    tl.store(log2_total + i_t, row_log2_total)


@triton.jit
def token_logprobs_backward_kernel(
    logits,  # [T, V], rows `row_stride` apart
    labels,  # [T]
    inverse_temperature,  # [T]
    mask,  # bool [T], or None
    entropy,  # [T]; read only where its gradient is given
    maximum,  # [T]
    log2_total,  # [T]
    grad_logprobs,  # [T], or None
    grad_entropy,  # [T], or None
    grad_logits,  # [T, V], contiguous; may be the logits
    row_stride,
    V,
    logit_scale,
    softcap,  # or None
    BLOCK_V: tl.constexpr,
):
    """One program a block of a row, all on grid axis 0, because the other axes end at 65535."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    i_t = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_v = tl.program_id(0) % num_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    p_grad = grad_logits + i_t * V + o_v
    grad_logp = 0.0
    if grad_logprobs is not None:
        grad_logp = tl.load(grad_logprobs + i_t)
    grad_h = 0.0
    row_entropy = 0.0
    if grad_entropy is not None:
        grad_h = tl.load(grad_entropy + i_t)
        row_entropy = tl.load(entropy + i_t)
    # A row that no loss looks at (prompt, padding) is not read.
    is_used = (grad_logp != 0) | (grad_h != 0)
    if mask is not None:
        is_used = is_used & (tl.load(mask + i_t) != 0)
    if is_used == 0:
        tl.store(p_grad, tl.zeros((BLOCK_V,), grad_logits.dtype.element_ty), mask=m_v)
        return
    p_x = logits + i_t * row_stride + o_v
    b_x = tl.load(p_x, mask=m_v, other=MINUS_INFINITY, eviction_policy="evict_first")
    b_grad = block_gradient(
        b_x, o_v, tl.load(labels + i_t), tl.load(maximum + i_t), tl.load(log2_total + i_t),
        row_entropy, grad_logp, grad_h,
        row_scale(tl.load(inverse_temperature + i_t), logit_scale, softcap), logit_scale, softcap,
        HAS_ENTROPY=grad_entropy is not None,
    )  # fmt: skip
    tl.store(p_grad, b_grad.to(grad_logits.dtype.element_ty), mask=m_v)


def launch_config(V: int, max_block: int, softcap: float | None) -> dict[str, Any]:
    """Block and warps for a vocabulary: a plain function, so that no launch needs an autotuner."""
    # The tanh of a cap needs registers of its own: half the columns a thread.
    share = 1 if softcap is None else 2
    block = min(max_block // share, max(128, triton.next_power_of_2(V)))
    return {"BLOCK_V": block, "num_warps": max(1, block * share // _COLUMNS_PER_WARP)}


def launch_logprobs(
    logits: Tensor, labels: Tensor, scaling: Scaling, mask: Tensor | None, has_entropy: bool
) -> tuple[Tensor, RowStatistics]:
    """`torch_logprobs` by the kernel."""
    T, V = logits.shape
    logits = with_unit_column_stride(logits)
    statistics = empty_statistics(logits, has_entropy)
    logp = torch.empty_like(statistics.maximum)
    if T > 0:
        with torch.cuda.device_of(logits):
            token_logprobs_kernel[(T,)](
                logits, labels, scaling.inverse_temperature, mask,
                logp, statistics.entropy if has_entropy else None, *statistics[1:],
                logits.stride(0), V, scaling.logit_scale, scaling.softcap,
                **launch_config(V, MAX_FORWARD_BLOCK, scaling.softcap),
            )  # fmt: skip
    return logp, statistics


def launch_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    scaling: Scaling,
    mask: Tensor | None,
    statistics: RowStatistics,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """`torch_logprobs_backward` by the kernel; `grad_logits` is contiguous."""
    T, V = logits.shape
    logits = with_unit_column_stride(logits)
    config = launch_config(V, MAX_BACKWARD_BLOCK, scaling.softcap)
    grad_logp = None if grad_logp is None else grad_logp.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    if T > 0:
        with torch.cuda.device_of(logits):
            token_logprobs_backward_kernel[(T * triton.cdiv(V, config["BLOCK_V"]),)](
                logits, labels, scaling.inverse_temperature, mask,
                *statistics, grad_logp, grad_entropy, grad_logits,
                logits.stride(0), V, scaling.logit_scale, scaling.softcap, **config,
            )  # fmt: skip


@triton.jit
def scale_kernel(
    gradient,  # [N]
    factor,  # []
    scaled,  # [N]; may be the gradient
    N,
    IS_INPLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient times factor, in fp32."""
    by = tl.load(factor).to(tl.float32)
    is_done = False
    if IS_INPLACE:  # the loss is mostly the end of the graph, and its factor 1
        is_done = by == 1.0
    if is_done:
        return
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_gradient = tl.load(gradient + o_n, mask=m_n).to(tl.float32)
    tl.store(scaled + o_n, (b_gradient * by).to(scaled.dtype.element_ty), mask=m_n)


def scale_config(is_inplace: bool) -> dict[str, Any]:
    """Constants and warps of `scale_kernel`."""
    return {"IS_INPLACE": is_inplace, "BLOCK_N": 4096, "num_warps": 8}


def scale_gradient(gradient: Tensor, factor: Tensor, scaled: Tensor, backend: str) -> None:
    """Writes gradient [T, V] times factor [] into `scaled`, which may be the gradient.

    A product in torch would round the factor to the dtype of the gradient.
    """
    if backend == "torch":
        scale_in_torch(gradient, factor, scaled)
    elif gradient.numel() > 0:
        N = gradient.numel()
        config = scale_config(scaled is gradient)
        with torch.cuda.device_of(gradient):
            scale_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
                gradient, factor, scaled, N, **config,
            )  # fmt: skip


def with_unit_column_stride(logits: Tensor) -> Tensor:
    """Return the logits themselves if only their rows are strided, else a copy."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
