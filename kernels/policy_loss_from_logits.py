"""Policy-gradient loss straight from logits, and their gradient in the same pass.

The loss of a token depends on its row of logits through l = log p_y and the entropy H alone, so a
row that has been read once knows what its gradient will be, up to the factor that comes with the
backward pass. With the token's weight w, and f'(l) of policy_objective.py,

    d loss / d x_j = w (f'(l) (1[j = y] - p_j) + c_H p_j (log p_j + H)) a s_j / t

in the notation of token_logprobs.py; c_H is the entropy coefficient. Reading a row twice, with one
write, is all the traffic; two operations in a row would read it three times.

A ratio of whole sequences must know all their log-probabilities before any token has a gradient:
that one goes through `token_logprobs` and `policy_loss`.

Shapes: T tokens (all leading dimensions of the logits, flattened), V vocabulary.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from gad_fast.kernels.arguments import compute_dtype, flat_labels, flat_mask
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.chunked_torch import Scaling
from gad_fast.kernels.logprob_kernels import scale_gradient
from gad_fast.kernels.policy_inputs import (
    PolicyInputs,
    PolicyOptions,
    policy_inputs,
    policy_objective,
    summarize,
)
from gad_fast.kernels.policy_loss import policy_loss
from gad_fast.kernels.policy_objective import (
    NUM_TERMS,
    PolicyObjective,
)
from gad_fast.kernels.policy_row_kernel import launch_policy_rows
from gad_fast.kernels.policy_rows import torch_policy_rows
from gad_fast.kernels.scaled_gradient import scaled_gradient
from gad_fast.kernels.token_logprobs import (
    LogitOptions,
    row_logits,
    row_scaling,
    token_logprobs,
)


# Opaque to torch.compile, which so sees one node, and cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::policy_loss_from_logits", mutates_args=())
def _loss_op(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
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
    has_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [NUM_TERMS, T], and the gradient of the logits [T, V], or [0] without one."""
    scaling = Scaling(inverse_temperature, logit_scale, softcap)
    inputs = PolicyInputs(old_logp, ref_logp, advantages, weights, is_weights)
    objective = PolicyObjective._make(
        (loss_type, clip_low, clip_high, clip_ratio_c, kl_coef, kl_type, entropy_coef)
    )
    run = launch_policy_rows if backend == "triton" else torch_policy_rows
    grad_logits = _room_for_gradient(logits, has_grad)
    terms = run(logits, labels, scaling, inputs, objective, grad_logits if has_grad else None)
    return terms[0].sum(), terms, grad_logits


@_loss_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weights, has_grad = rest[7], rest[-1]
    terms = weights.new_empty(NUM_TERMS, logits.shape[0])
    return weights.new_empty(()), terms, _room_for_gradient(logits, has_grad)


def _room_for_gradient(logits: Tensor, has_grad: bool) -> Tensor:
    shape = logits.shape if has_grad else (0,)
    return torch.empty(shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, grad_logits = output
    ctx.backend = inputs[-2]
    ctx.mark_non_differentiable(terms, grad_logits)
    # Else autograd would make zeros for every output that is no loss, as large as a gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_logits)


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
    (grad_logits,) = ctx.saved_tensors
    return scaled_gradient(grad_logits, grad_outputs[0], ctx.backend), *(None,) * 18


_loss_op.register_autograd(_backward, setup_context=_setup_context)


class _LossOverLogits(torch.autograd.Function):
    """`_loss_op` with the logits' own memory for their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        scaling: Scaling,
        inputs: PolicyInputs,
        objective: PolicyObjective,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        run = launch_policy_rows if backend == "triton" else torch_policy_rows
        terms = run(logits, labels, scaling, inputs, objective, logits)
        # So that whoever still needs the logits is told.
        torch.autograd.graph.increment_version(logits)
        ctx.backend = backend
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides ctx)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Of a second pass, which would scale twice, autograd complains here.
        (gradient,) = (x.detach() for x in ctx.saved_tensors)
        scale_gradient(gradient, grad_outputs[0], gradient, ctx.backend)
        torch.autograd.graph.increment_version(gradient)
        return gradient, *(None,) * 5


def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: Backend = "auto",
    **options: Unpack[PolicyOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of the labels' log-probabilities, in one pass over the logits.

    Differentiable once with respect to the logits. Where they need a gradient, it is made in the
    forward pass and kept until the backward pass has scaled it; where not, there is none.

    Args:
        logits: `[..., V]`.
        labels: `[...]`, int32 or int64, in [0, V) where the mask keeps them.
        old_logp: `[...]`, under the policy that sampled the labels; None on-policy.
        advantages: `[...]`, or one for each sequence.
        mask: `[...]`, true or not 0 at the tokens that count; None keeps all. What a token outside
            holds, NaN too, changes nothing.
        temperature: above 0, one for all or `[...]`; divides the logits.
        logit_scale: above 0; multiplies the logits before all else.
        softcap: above 0; then makes `softcap * tanh(logits / softcap)` of them. None for no cap.
        inplace_backward: as in `token_logprobs`; but here the logits are lost in the forward pass.
        backend: "auto" is "triton" for float32 or bfloat16 on CUDA where Triton is installed.
        options: those of `policy_loss`.

    Returns:
        The loss, 0-dim, and the metrics of `policy_loss`; the entropy is always among them.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    logit_options: LogitOptions = {
        "temperature": temperature,
        "mask": mask,
        "inplace_backward": inplace_backward,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "backend": backend,
    }
    run = _loss_of_sequences if options.get("ratio_level") == "sequence" else _loss_of_tokens
    return run(logits, labels, old_logp, advantages, options, **logit_options)


def _loss_of_tokens(
    logits: Tensor,
    labels: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    options: PolicyOptions,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    inplace_backward: bool,
    logit_scale: float,
    softcap: float | None,
    backend: Backend,
) -> tuple[Tensor, dict[str, Tensor]]:
    has_grad = logits.requires_grad and torch.is_grad_enabled()
    is_inplace = inplace_backward and has_grad
    rows = row_logits(logits, is_inplace=is_inplace)
    shape, device, dtype = logits.shape[:-1], logits.device, compute_dtype(logits.dtype)
    objective = policy_objective(options)
    kept = flat_mask(mask, shape, device)
    inputs = policy_inputs(
        old_logp, advantages, kept, shape=shape, device=device, dtype=dtype, options=options
    )
    index = flat_labels(labels, shape, rows.shape[1], kept, device)
    scaling = row_scaling(logits, temperature, logit_scale, softcap)
    path = resolve_backend(logits, backend)
    if is_inplace:
        loss, terms = _LossOverLogits.apply(rows, index, scaling, inputs, objective, path)
    else:
        loss, terms, _ = _loss_op(rows, index, *scaling, *inputs, *objective, path, has_grad)
    return loss, summarize(terms, kept, index.numel())


def _loss_of_sequences(
    logits: Tensor,
    labels: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    options: PolicyOptions,
    **logit_options: Unpack[LogitOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    has_bonus = policy_objective(options).entropy_coef != 0
    path = resolve_backend(logits, logit_options.get("backend", "auto"))
    mask = logit_options.get("mask")
    logp, entropy = token_logprobs(logits, labels, return_entropy=True, **logit_options)
    entropy = entropy if has_bonus else entropy.detach()
    return policy_loss(logp, old_logp, advantages, mask, entropy=entropy, backend=path, **options)
