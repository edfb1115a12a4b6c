"""Log-probability of each label, and entropy of each row, of softmax(logits / temperature).

For one row of logits x, scale a, temperature t and label y, write z = v / t with

    v = a x,    or where there is a softcap c    v = c tanh(a x / c)

and then

    p_j    = exp(z_j - lse)             lse = log sum_j exp(z_j)
    logp   = log p_y = z_y - lse
    H      = -sum_j p_j log p_j         with 0 log 0 = 0

From d lse / d z_j = p_j follow, with 1[j = y] the indicator of the label,

    d logp / d z_j = 1[j = y] - p_j
    d H    / d z_j = -p_j (log p_j + H)

and so, for upstream gradients g of logp and g_H of H, with s_j = 1 - (v_j / c)^2, or 1 without cap,

    d loss / d x_j = (g (1[j = y] - p_j) - g_H p_j (log p_j + H)) a s_j / t

The backward pass needs the logits and three numbers a row: H, and lse as its two parts, max_j z_j
and log sum_j exp(z_j - max). They stay apart because their sum would have the rounding step of the
larger one, which for a confident label is as much as 1 - p. No [T, V] intermediate is kept.

Shapes: T tokens (all leading dimensions of the logits, flattened), V vocabulary.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from gad_fast.kernels.arguments import (
    check_float,
    check_range,
    compute_dtype,
    flat_labels,
    flat_mask,
    inverse_temperatures,
)
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.chunked_torch import (
    RowStatistics,
    Scaling,
    empty_statistics,
    torch_logprobs,
    torch_logprobs_backward,
)
from gad_fast.kernels.logprob_kernels import launch_logprobs, launch_logprobs_backward


def token_logprobs_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by the book, differentiated by autograd: the truth in tests.

    Takes what `token_logprobs` takes, and computes in float32, or float64 for float64 logits.
    """
    v = logit_scale * logits.to(compute_dtype(logits.dtype))
    if softcap is not None:
        v = softcap * torch.tanh(v / softcap)
    each = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(v / each, dim=-1)  # [..., V]
    p = log_p.exp()
    logprobs = log_p.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # 0 * -inf would be NaN, in the value and in the gradient.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs, entropy


# Opaque to torch.compile, which so sees one node, and cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::token_logprobs", mutates_args=())
def _forward_op(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    backend: str,
    has_entropy: bool,
    is_inplace: bool,  # noqa: ARG001  (of the backward pass, which finds it here)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and statistics, each `[T]`, of logits `[T, V]`."""
    run = launch_logprobs if backend == "triton" else torch_logprobs
    scaling = Scaling(inverse_temperature, logit_scale, softcap)
    logp, (entropy, maximum, log_total) = run(logits, labels, scaling, mask, has_entropy)
    return logp, entropy, maximum, log_total


@_forward_op.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_entropy = rest[6]
    entropy, maximum, log_total = empty_statistics(logits, has_entropy)
    return torch.empty_like(maximum), entropy, maximum, log_total


@torch.library.custom_op("gad_fast::token_logprobs_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    backend: str,
    entropy: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient of the logits, `[T, V]`."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    run = launch_logprobs_backward if backend == "triton" else torch_logprobs_backward
    scaling = Scaling(inverse_temperature, logit_scale, softcap)
    statistics = RowStatistics(entropy, maximum, log_total)
    run(logits, labels, scaling, mask, statistics, grad_logp, grad_entropy, grad_logits)
    return grad_logits


@_backward_op.register_fake
def _(logits: Tensor, *_rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("gad_fast::token_logprobs_backward_", mutates_args=("logits",))
def _backward_op_(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    mask: Tensor | None,
    backend: str,
    entropy: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """The same, written over the logits."""
    run = launch_logprobs_backward if backend == "triton" else torch_logprobs_backward
    scaling = Scaling(inverse_temperature, logit_scale, softcap)
    statistics = RowStatistics(entropy, maximum, log_total)
    run(logits, labels, scaling, mask, statistics, grad_logp, grad_entropy, logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, inverse_temperature, *ctx.scaling, mask = inputs[:6]
    ctx.backend, has_entropy, ctx.is_inplace = inputs[6:]
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics[1 if has_entropy else 0 :])
    ctx.save_for_backward(logits, labels, inverse_temperature, mask, *statistics)
    # Else an output that is only a metric would come back as zeros, and cost passes over V.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy = grad_outputs[:2]
    grad_logits = None
    if grad_logp is not None or grad_entropy is not None:
        logits, labels, inverse_temperature, mask, *statistics = ctx.saved_tensors
        scaling = Scaling(inverse_temperature, *ctx.scaling)
        rest = (labels, *scaling, mask, ctx.backend, *statistics, grad_logp, grad_entropy)
        if ctx.is_inplace:
            grad_logits = logits.detach()
            # As an operation it counts the write, so that whoever still needs the logits is told.
            _backward_op_(grad_logits, *rest)
        else:
            grad_logits = _backward_op(logits, *rest)
    return grad_logits, *(None,) * 8


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def row_logits(logits: Tensor, *, is_inplace: bool) -> Tensor:
    """Logits as [T, V]; raises ValueError for what a row operation cannot take.

    Args:
        logits: `[..., V]`.
        is_inplace: whether they are to be written over, for which they must be contiguous.
    """
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        msg = f"logits must have a vocabulary as their last dimension, got {tuple(logits.shape)}"
        raise ValueError(msg)
    if is_inplace and not logits.is_contiguous():
        msg = f"logits must be contiguous for inplace_backward, got strides {logits.stride()}"
        raise ValueError(msg)
    if is_inplace and torch.compiler.is_compiling():
        msg = "inplace_backward must be False under torch.compile, got True"
        raise ValueError(msg)
    return logits.reshape(-1, logits.shape[-1])


def row_scaling(
    logits: Tensor, temperature: float | Tensor, logit_scale: float, softcap: float | None
) -> Scaling:
    """Scaling of the rows of logits `[..., V]`; raises ValueError for a number not above 0."""
    check_range("logit_scale", logit_scale, 0, is_open=True)
    if softcap is not None:
        check_range("softcap", softcap, 0, is_open=True)
        softcap = float(softcap)
    dtype = compute_dtype(logits.dtype)
    inverse = inverse_temperatures(temperature, logits.shape[:-1], logits.device, dtype)
    return Scaling(inverse, float(logit_scale), softcap)


class LogitOptions(TypedDict, total=False):
    """The keywords that `token_logprobs` explains beside `return_entropy`."""

    temperature: float | Tensor
    mask: Tensor | None
    inplace_backward: bool
    logit_scale: float
    softcap: float | None
    backend: Backend


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[LogitOptions],
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, and if asked the entropy of each row, of softmax(logits / t).

    Differentiable once with respect to the logits, which are kept for that with a few numbers a
    row. Detach an entropy that outlives the step as a metric, or it keeps the logits alive.

    Args:
        logits: `[..., V]`; copied where the leading dimensions do not flatten into one stride.
        labels: `[...]`, int32 or int64, in [0, V) where the mask keeps them.
        temperature: above 0, one for all or `[...]`; divides the logits.
        mask: `[...]`; rows where it is 0 may hold anything, and give 0 with a gradient of 0.
        return_entropy: whether to return the entropy too.
        inplace_backward: whether the gradient overwrites the logits: contiguous ones, that nothing
            else needs, their maker's backward pass included. Once, and not under torch.compile.
        logit_scale: above 0; multiplies the logits before all else.
        softcap: above 0; then makes `softcap * tanh(logits / softcap)` of them. None for no cap.
        backend: "auto" is "triton" for float32 or bfloat16 on CUDA where Triton is installed.

    Returns:
        Log-probabilities `[...]` in float32 (float64 for float64 logits), or with them the entropy
        in nats, `[...]`.

    Raises:
        ValueError: what came does not fit; the line names the argument. Labels on a GPU are not
            looked at, which would wait for it: one out of range gives NaN.
    """
    rows, shape = row_logits(logits, is_inplace=inplace_backward), logits.shape[:-1]
    kept = flat_mask(mask, shape, logits.device)
    index = flat_labels(labels, shape, rows.shape[1], kept, logits.device)
    scaling = row_scaling(logits, temperature, logit_scale, softcap)
    path = resolve_backend(logits, backend)
    options = (kept, path, return_entropy, inplace_backward)
    logp, entropy, *_ = _forward_op(rows, index, *scaling, *options)
    return (logp.reshape(shape), entropy.reshape(shape)) if return_entropy else logp.reshape(shape)
