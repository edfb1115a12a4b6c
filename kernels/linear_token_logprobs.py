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
    HeadCall,
    LinearHead,
    LogitsDtype,
    autocast_hidden,
    checked_head,
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

    Args:
        hidden: `[..., D]`, bfloat16, float32 or float64; under autocast taken in its dtype.
        weight: `[V, D]`; in float32 it is cast once a pass. An adapter (LoRA) is not in it.
        labels: `[...]`, int32 or int64. Outside [0, V) they are an error on a CPU, NaN on a GPU.
        bias: `[V]`; logits are cap(logit_scale * (X W^T + bias)).
        temperature: above 0, a number or `[...]`; the logits are divided by it.
        mask: `[...]`; tokens outside never reach the head (finding them waits for a GPU once).
        ignore_index: a label whose tokens are outside the mask too; None for none.
        return_entropy: whether to return the entropy too.
        logits_dtype: "bfloat16" rounds the logits as an engine with a bfloat16 head does.
        softcap: cap(u) is softcap * tanh(u / softcap), None for none.
        logit_scale: above 0.
        accum_dtype: float32 or bfloat16, of the sum over blocks of tokens that is dW.
        max_workspace_mb: what a part of the logits may take; by default 64 on a CPU, else 1024.
        backend: "auto" is "triton" for bfloat16 on CUDA with D a multiple of 8, "torch" otherwise.

    Returns:
        Log-probabilities `[...]`, float32 (float64 for float64), or with them the entropy in nats;
        0 outside the mask. Differentiable once.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    hidden = autocast_hidden(hidden)
    head = checked_head(hidden, weight, bias, logit_scale, softcap, logits_dtype)
    call = HeadCall(temperature, logits_dtype, max_workspace_mb, backend)
    kept = _kept_mask(mask, labels, hidden, ignore_index)
    logp, entropy = _logprobs(hidden, head, labels, kept, call, return_entropy, accum_dtype)
    return (logp, entropy) if return_entropy else logp


def _logprobs(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    kept: Tensor | None,
    call: HeadCall,
    return_entropy: bool,
    accum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[...]` and entropy, which means nothing where it is not asked for."""
    check_choice("accum_dtype", str(accum_dtype), ("torch.float32", "torch.bfloat16"))
    shape, device, dtype = labels.shape, hidden.device, compute_dtype(hidden.dtype)
    logp, entropy, *_ = linear_logprobs_op(
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias,
        flat_labels(labels, shape, head.weight.shape[0], kept, device),
        inverse_temperatures(call.temperature, shape, device, dtype), kept,
        head.logit_scale, head.softcap, call.logits_dtype, return_entropy, accum_dtype,
        workspace_bytes(call.max_workspace_mb, device),
        resolve_head_backend(hidden, head.weight, call.backend),
    )  # fmt: skip
    return logp.reshape(shape), entropy.reshape(shape)


def _kept_mask(
    mask: Tensor | None, labels: Tensor, hidden: Tensor, ignore_index: int | None
) -> Tensor | None:
    """Which tokens count, bool [T], or None where all do."""
    check_shape("labels", labels, hidden.shape[:-1], of="the rows of hidden")
    kept = flat_mask(mask, labels.shape, hidden.device)
    if ignore_index is None:
        return kept
    is_kept = labels.reshape(-1) != ignore_index
    return is_kept if kept is None else is_kept & kept
