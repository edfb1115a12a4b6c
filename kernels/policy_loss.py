"""Policy-gradient loss of log-probabilities that are there already.

The maths of one token is in policy_objective.py, the weight of a token in policy_inputs.py. The
loss is linear in what they give, so its derivative is known in the forward pass:

    loss = sum_t w_t f(l_t)        d loss / d l_t = w_t f'(l_t)        d loss / d H_t = -w_t c_H

One pass over [T] writes all of it, and the backward pass is one product with the upstream gradient.

Shapes: T tokens, all dimensions of the labels flattened.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from gad_fast.kernels.arguments import compute_dtype, flat_floats, flat_mask
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.optional_triton import tl, triton
from gad_fast.kernels.policy_inputs import (
    PolicyInputs,
    PolicyOptions,
    policy_inputs,
    policy_objective,
    sequence_level_old_logp,
    summarize,
)
from gad_fast.kernels.policy_objective import (
    NUM_TERMS,
    PolicyObjective,
    kernel_options,
    policy_token,
    store_terms,
    token_loss_reference,
    token_terms,
)
from gad_fast.kernels.sequences import Sequences


def policy_loss_reference(
    logp: Tensor, entropy: Tensor | None, inputs: PolicyInputs, objective: PolicyObjective
) -> Tensor:
    """The loss by the book, differentiated by autograd: the truth in tests.

    Args:
        logp: `[T]`.
        entropy: `[T]`, or None.
        inputs: the other inputs, each `[T]`.
        objective: what to compute of them.
    """
    return token_loss_reference(logp, entropy, *inputs, objective).sum()


@triton.jit
def policy_loss_kernel(
    logp,  # [T]
    entropy,  # [T], or None
    old_logp,  # [T], or None
    ref_logp,  # [T], or None
    advantages,  # [T]
    weights,  # [T]
    is_weights,  # [T], or None
    terms,  # [NUM_TERMS, T]
    grad_logp,  # [T]
    T,
    clip_low,
    clip_high,
    clip_ratio_c,
    kl_coef,
    entropy_coef,
    LOSS_TYPE: tl.constexpr,
    KL_TYPE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a block of tokens: all arithmetic of the loss behind one load of each input."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_logp = tl.load(logp + o_t, mask=m_t, other=0.0)
    b_weight = tl.load(weights + o_t, mask=m_t, other=0.0)
    b_advantage = tl.load(advantages + o_t, mask=m_t, other=0.0)
    b_entropy = b_logp * 0.0
    if entropy is not None:
        b_entropy = tl.load(entropy + o_t, mask=m_t, other=0.0)
    b_old = b_logp
    if old_logp is not None:
        b_old = tl.load(old_logp + o_t, mask=m_t, other=0.0)
    b_ref = b_logp
    if ref_logp is not None:
        b_ref = tl.load(ref_logp + o_t, mask=m_t, other=0.0)
    b_is = 1.0
    if is_weights is not None:
        b_is = tl.load(is_weights + o_t, mask=m_t, other=0.0)
    b_loss, b_grad, b_pg, b_kl, b_ratio, b_log_ratio, b_low, b_high, b_dual = policy_token(
        b_logp, b_entropy, b_old, b_ref, b_advantage, b_is,
        clip_low, clip_high, clip_ratio_c, kl_coef, entropy_coef, LOSS_TYPE, KL_TYPE, HAS_DUAL_CLIP,
    )  # fmt: skip  # pyright: ignore[reportGeneralTypeIssues]
    # A token of weight 0 may hold anything, and 0 times that is not always 0.
    b_loss = tl.where(b_weight != 0, b_weight * b_loss, 0.0)
    b_grad = tl.where(b_weight != 0, b_weight * b_grad, 0.0)
    tl.store(grad_logp + o_t, b_grad, mask=m_t)
    store_terms(
        terms, T, o_t, m_t,
        b_loss, b_pg, b_kl, b_entropy, b_ratio, b_log_ratio, b_low, b_high, b_dual,
    )  # fmt: skip


BLOCK_T = 512


def launch_policy_loss(
    logp: Tensor, entropy: Tensor | None, inputs: PolicyInputs, objective: PolicyObjective
) -> tuple[Tensor, Tensor]:
    """Terms [NUM_TERMS, T] and derivative [T] of contiguous float32 inputs [T]."""
    T = logp.numel()
    terms, grad_logp = logp.new_empty(NUM_TERMS, T), torch.empty_like(logp)
    options = kernel_options(objective, has_reference=inputs.ref_logp is not None)
    options["BLOCK_T"] = BLOCK_T
    if T > 0:
        with torch.cuda.device_of(logp):
            policy_loss_kernel[(triton.cdiv(T, BLOCK_T),)](
                logp, entropy, *inputs, terms, grad_logp, T, **options
            )
    return terms, grad_logp


# Opaque to torch.compile, which so sees one node, and cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::policy_loss", mutates_args=())
def _policy_loss_op(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    is_weights: Tensor | None,
    loss_type: str,
    clip_low: float,
    clip_high: float,
    clip_ratio_c: float | None,
    kl_coef: float,
    kl_type: str,
    entropy_coef: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [NUM_TERMS, T] and derivative [T] with respect to logp."""
    inputs = PolicyInputs(old_logp, ref_logp, advantages, weights, is_weights)
    objective = PolicyObjective._make(
        (loss_type, clip_low, clip_high, clip_ratio_c, kl_coef, kl_type, entropy_coef)
    )
    run = launch_policy_loss if backend == "triton" else _torch_policy_loss
    terms, grad_logp = run(logp, entropy, inputs, objective)
    return terms[0].sum(), terms, grad_logp


def _torch_policy_loss(
    logp: Tensor, entropy: Tensor | None, inputs: PolicyInputs, objective: PolicyObjective
) -> tuple[Tensor, Tensor]:
    return token_terms(logp, entropy, *inputs, objective)


@_policy_loss_op.register_fake
def _(logp: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logp.new_empty(()), logp.new_empty(NUM_TERMS, logp.numel()), torch.empty_like(logp)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_entropy, ctx.entropy_coef = inputs[1] is not None, inputs[13]
    _, terms, grad_logp = output
    ctx.mark_non_differentiable(terms, grad_logp)
    ctx.save_for_backward(grad_logp, inputs[5])


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    grad_logp, weights = ctx.saved_tensors
    grad_loss = grad_outputs[0]
    grad_entropy = -ctx.entropy_coef * grad_loss * weights if ctx.has_entropy else None
    return grad_loss * grad_logp, grad_entropy, *(None,) * 13


_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    backend: Backend = "auto",
    **options: Unpack[PolicyOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss, and what to log of it, from the log-probabilities of sampled tokens.

    Differentiable once with respect to `logp` and `entropy`; everything else is a constant.

    Args:
        logp: `[T]` or `[B, L]`, of each token under the student.
        old_logp: `[...]`, under the policy that sampled it; None on-policy, where the ratio is 1.
        advantages: `[...]`, or one for each sequence.
        mask: `[...]`, true or not 0 at the tokens that count; None keeps all. What a token outside
            holds, NaN too, changes nothing.
        entropy: `[...]`, in nats; with `entropy_coef` other than 0 it earns a bonus.
        backend: "auto" is "triton" for float32 on CUDA where Triton is installed, else "torch".
        options: `PolicyOptions`.

    Returns:
        The loss, 0-dim, and metrics: 0-dim tensors on the device, means over the kept tokens
        (`pg_loss`, `kl`, `entropy`, `ratio_mean`, `ratio_min`, `ratio_max`, `approx_kl`,
        `approx_kl_k3`, `clip_fraction_low`, `_high` and `_dual`), and `num_tokens`.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    shape, device, dtype = logp.shape, logp.device, compute_dtype(logp.dtype)
    objective = policy_objective(options)
    flat_logp = flat_floats("logp", logp, shape, device, dtype)
    flat_kept = flat_mask(mask, shape, device)
    flat_entropy = None
    if entropy is not None:
        flat_entropy = flat_floats("entropy", entropy, shape, device, dtype)
    objective.check_entropy(flat_entropy)
    inputs = policy_inputs(
        old_logp, advantages, flat_kept, shape=shape, device=device, dtype=dtype, options=options
    )
    if options.get("ratio_level") == "sequence":
        inputs = at_sequence_level(flat_logp, inputs, flat_kept, shape, options)
    path = resolve_backend(flat_logp, backend, dtypes=(torch.float32,))
    loss, terms, _ = _policy_loss_op(flat_logp, flat_entropy, *inputs, *objective, path)
    return loss, summarize(terms, flat_kept, logp.numel())


def at_sequence_level(
    logp: Tensor,
    inputs: PolicyInputs,
    mask: Tensor | None,
    shape: torch.Size,
    options: PolicyOptions,
) -> PolicyInputs:
    """The inputs with old log-probabilities that give each token the ratio of its sequence."""
    if inputs.old_logp is None:
        return inputs
    kept = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    sequences = Sequences(shape, options.get("cu_seqlens"))
    shifted = sequence_level_old_logp(logp.detach(), inputs.old_logp, kept, sequences)
    return inputs._replace(old_logp=shifted)
