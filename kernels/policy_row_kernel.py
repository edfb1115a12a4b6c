"""Triton kernel that makes the policy loss of each row of logits, and their gradient.

The maths is in policy_loss_from_logits.py.

Shapes: T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from gad_fast.kernels.chunked_torch import Scaling
from gad_fast.kernels.logprob_kernels import (
    MINUS_INFINITY,
    block_gradient,
    launch_config,
    read_token,
    row_scale,
    with_unit_column_stride,
)
from gad_fast.kernels.optional_triton import tl, triton
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_objective import (
    NUM_TERMS,
    PolicyObjective,
    kernel_options,
    policy_token,
    store_terms,
)


@triton.jit
def policy_loss_row_kernel(
    logits,  # [T, V], rows `row_stride` apart
    labels,  # [T]
    inverse_temperature,  # [T]
    old_logp,  # [T], or None
    ref_logp,  # [T], or None
    advantages,  # [T]
    weights,  # [T]
    is_weights,  # [T], or None
    terms,  # [NUM_TERMS, T]
    grad_logits,  # [T, V], contiguous, or None; may be the logits
    row_stride,
    T,
    V,
    logit_scale,
    softcap,  # or None
    clip_low,
    clip_high,
    clip_ratio_c,
    kl_coef,
    entropy_coef,
    LOSS_TYPE: tl.constexpr,
    KL_TYPE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row: reads it, knows the loss, and reads it again to write its gradient."""
    i_t = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + i_t)
    if weight == 0:  # prompt or padding: not read, and may hold anything
        store_terms(terms, T, i_t, True, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        if grad_logits is not None:
            _write_zeros(grad_logits + i_t * V, V, BLOCK_V)
        return
    p_row = logits + i_t * row_stride
    label = tl.load(labels + i_t)
    scale = row_scale(tl.load(inverse_temperature + i_t), logit_scale, softcap)
    # The row should stay in L2 for the second read.
    logp, maximum, log2_total, entropy = read_token(
        p_row, label, V, scale, logit_scale, softcap, "evict_last", BLOCK_V
    )
    old = logp if old_logp is None else tl.load(old_logp + i_t)
    ref = logp if ref_logp is None else tl.load(ref_logp + i_t)
    is_weight = 1.0 if is_weights is None else tl.load(is_weights + i_t)
    loss, grad, pg, kl, ratio, log_ratio, is_low, is_high, is_dual = policy_token(
        logp, entropy, old, ref, tl.load(advantages + i_t), is_weight,
        clip_low, clip_high, clip_ratio_c, kl_coef, entropy_coef, LOSS_TYPE, KL_TYPE, HAS_DUAL_CLIP,
    )  # fmt: skip
    store_terms(
        terms, T, i_t, True,
        weight * loss, pg, kl, entropy, ratio, log_ratio, is_low, is_high, is_dual,
    )  # fmt: skip
    if grad_logits is not None:
        _write_gradient(
            p_row, grad_logits + i_t * V, V, label, maximum, log2_total, entropy,
            weight * grad, -weight * entropy_coef,
            scale, logit_scale, softcap, HAS_ENTROPY, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _write_zeros(p_grad, V, BLOCK_V: tl.constexpr):
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        tl.store(p_grad + o_v, tl.zeros((BLOCK_V,), p_grad.dtype.element_ty), mask=o_v < V)


@triton.jit
def _write_gradient(
    p_row,
    p_grad,
    V,
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
    BLOCK_V: tl.constexpr,
):
    """The second read of a row.

    It may be over the first: a barrier of the first read's reductions stands between each of its
    loads and these stores, and here a thread stores where it has loaded.
    """
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_x = tl.load(p_row + o_v, mask=m_v, other=MINUS_INFINITY, eviction_policy="evict_first")
        b_grad = block_gradient(
            b_x, o_v, label, maximum, log2_total, entropy,
            grad_logp, grad_h, scale, logit_scale, softcap, HAS_ENTROPY,
        )  # fmt: skip
        tl.store(p_grad + o_v, b_grad.to(p_grad.dtype.element_ty), mask=m_v)


# 16 warps: one row a program, two programs a multiprocessor.
MAX_BLOCK = 8192


def launch_policy_rows(
    logits: Tensor,
    labels: Tensor,
    scaling: Scaling,
    inputs: PolicyInputs,
    objective: PolicyObjective,
    grad_logits: Tensor | None,
) -> Tensor:
    """Terms [NUM_TERMS, T]; where there is room for it, writes the gradient of the logits."""
    T, V = logits.shape
    logits = with_unit_column_stride(logits)
    terms = inputs.weights.new_empty(NUM_TERMS, T)
    inverse_temperature, logit_scale, softcap = scaling
    options = kernel_options(objective, has_reference=inputs.ref_logp is not None)
    options["HAS_ENTROPY"] = objective.entropy_coef != 0
    if T > 0:
        with torch.cuda.device_of(logits):
            policy_loss_row_kernel[(T,)](
                logits, labels, inverse_temperature, *inputs, terms, grad_logits,
                logits.stride(0), T, V, logit_scale, softcap,
                **options, **launch_config(V, MAX_BLOCK, softcap),
            )  # fmt: skip
    return terms
