"""Log-probability of each label, and entropy, straight from hidden states: no whole logits.

The logits of hidden states X [T, D] under a head W [V, D], b are cap(logit_scale (X W^T + b)), and
token_logprobs.py says what follows from them. The forward pass keeps a few numbers a token. The
backward pass makes the logits again, part by part, because an upstream gradient may be anything;
with dZ the gradient of X W^T + b,

    dX = dZ W        dW = dZ^T X        db = sum_t dZ_t

which is four products of 2 T D V operations in all, or three with a frozen head. Where the loss is
one of this package's policy losses, linear_policy_loss.py needs three, or two.

On CUDA, and with bfloat16 operands, Triton kernels make tiles of logits in registers, in float32.
The torch path works on blocks of tokens. Tokens that do not count are dropped before either.

Shapes: T tokens (all leading dimensions of the hidden states, flattened), D width, V vocabulary.
"""

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from gad_fast.kernels.arguments import (
    check_choice,
    check_shape,
    compute_dtype,
    flat_labels,
    flat_mask,
    inverse_temperatures,
)
from gad_fast.kernels.backend import Backend
from gad_fast.kernels.linear_head import (
    LogitsDtype,
    autocast_hidden,
    check_head,
    workspace_bytes,
)
from gad_fast.kernels.linear_logprobs_op import linear_logprobs_op
from gad_fast.kernels.linear_tiles import resolve_head_backend


class HeadOptions(TypedDict, total=False):
    """The keywords that `linear_token_logprobs` explains."""

    bias: Tensor | None
    temperature: float | Tensor
    mask: Tensor | None
    ignore_index: int | None
    logits_dtype: LogitsDtype
    softcap: float | None
    logit_scale: float
    accum_dtype: torch.dtype
    max_workspace_mb: float | None
    backend: Backend


def linear_token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by the book, differentiated by autograd: the truth in tests.

    Args:
        hidden: `[..., D]`, in the dtype to compute in, like weight and bias.
        weight: `[V, D]`.
        labels: `[...]`, each in [0, V).
        bias: `[V]`.
        temperature: above 0, a number or `[...]`; the logits are divided by it.
        softcap: above 0, of the logits before the temperature; None for none.
        logit_scale: of the logits before the cap.

    Returns:
        Log-probabilities and entropy in nats, both `[...]`.
    """
    v = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        v = softcap * torch.tanh(v / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    log_p = torch.log_softmax(v / temperature, dim=-1)  # [..., V]
    logprobs = log_p.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    # 0 * -inf would be NaN, in the value and in the gradient.
    return logprobs, -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    logits_dtype: LogitsDtype = "float32",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    accum_dtype: torch.dtype = torch.float32,
    max_workspace_mb: float | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits that a head gives to hidden states, without whole logits.

    Differentiable once, in `hidden`, `weight` and `bias`; what needs no gradient costs none.

    Args:
        hidden: `[..., D]`, bfloat16, float32 or float64; under autocast taken in its dtype.
        weight: `[V, D]`, of any of these dtypes; where it is not that of `hidden`, it is cast once
            a pass, and its gradient comes in its own dtype. An adapter (LoRA) is not in it.
        labels: `[...]`, int32 or int64. Outside [0, V) they are an error on a CPU, NaN on a GPU.
        bias: `[V]`, of any of these dtypes.
        temperature: above 0, a number or `[...]`; the logits are divided by it.
        mask: `[...]`; tokens outside it give 0 and gradient 0, and never reach the head. On a GPU,
            finding the others waits for it once.
        ignore_index: a label whose tokens are outside the mask too; None for none.
        return_entropy: whether to return the entropy too.
        logits_dtype: "bfloat16" rounds logits as an engine with a bfloat16 head does. "float32"
            keeps those of bfloat16 operands in float32 on CUDA; a CPU's own product rounds them.
        softcap: of the logits, before the temperature: cap(u) = softcap tanh(u / softcap).
        logit_scale: of the logits, before the cap.
        accum_dtype: float32 or bfloat16, of the sum over blocks of tokens that is dW.
        max_workspace_mb: what a part of the logits may take; by default 64 on a CPU, else 1024.
        backend: "auto" is "triton" for bfloat16 on CUDA with D a multiple of 8, "torch" otherwise.

    Returns:
        Log-probabilities `[...]` in float32 (float64 for float64), or the pair of them and the
        entropy in nats.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    hidden = autocast_hidden(hidden)
    check_head(
        hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, logits_dtype=logits_dtype
    )
    check_shape("labels", labels, hidden.shape[:-1], of="the rows of hidden")
    check_choice("accum_dtype", str(accum_dtype), ("torch.float32", "torch.bfloat16"))
    shape, device = labels.shape, hidden.device
    kept = _kept_mask(flat_mask(mask, shape, device), labels, ignore_index)
    logp, entropy, *_ = linear_logprobs_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat_labels(labels, shape, weight.shape[0], kept, device),
        inverse_temperatures(temperature, shape, device, compute_dtype(hidden.dtype)),
        kept,
        logit_scale,
        softcap,
        logits_dtype,
        return_entropy,
        accum_dtype,
        workspace_bytes(max_workspace_mb, device),
        resolve_head_backend(hidden, weight, backend),
    )
    return (logp.reshape(shape), entropy.reshape(shape)) if return_entropy else logp.reshape(shape)


def _kept_mask(mask: Tensor | None, labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Which tokens count, bool [T], or None where all do."""
    if ignore_index is None:
        return mask
    is_kept = labels.reshape(-1) != ignore_index
    return is_kept if mask is None else is_kept & mask
