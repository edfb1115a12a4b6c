"""Policy-gradient loss straight from hidden states: the logits are never whole.

With hidden states X [T, D] and a head W [V, D] (bias b), row t of the logits is x = W X_t + b, and
policy_loss_from_logits.py says what loss and dZ follow from it. Then

    dX = dZ W        dW = dZ^T X        db = sum_t dZ_t

The loss knows its own gradient as soon as it knows the log-probabilities, so all of it is done in
the forward pass: three products of 2 T D V operations, two with a frozen head. An operation that
takes any upstream gradient has to make the logits again in its backward pass, and needs four.

Tokens are worked on in chunks. A chunk's logits are the only [C, V] there is; dW is summed over
chunks in float32. Tokens outside the mask are dropped before the head. A loss over ratios of whole
sequences needs all log-probabilities before any gradient, and takes the other way:
`linear_token_logprobs` and `policy_loss`.

Shapes: T kept tokens, D width, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from gad_fast.kernels.arguments import (
    compute_dtype,
    flat_labels,
    flat_mask,
    inverse_temperatures,
)
from gad_fast.kernels.backend import Backend
from gad_fast.kernels.chunked_linear import HeadGradients, Needs, even_slices, head_gradients
from gad_fast.kernels.linear_head import (
    HeadCall,
    LinearHead,
    LogitsDtype,
    autocast_hidden,
    checked_head,
    logits_bytes,
    workspace_bytes,
)
from gad_fast.kernels.linear_tiles import resolve_head_backend
from gad_fast.kernels.linear_token_logprobs import linear_token_logprobs
from gad_fast.kernels.policy_chunk import (
    ChunkSettings,
    Tokens,
    rounded_chunk,
    tile_chunk,
    torch_chunk,
)
from gad_fast.kernels.policy_inputs import (
    PolicyInputs,
    PolicyOptions,
    policy_inputs,
    policy_objective,
    summarize,
)
from gad_fast.kernels.policy_loss import policy_loss
from gad_fast.kernels.policy_objective import NUM_TERMS, PolicyObjective
from gad_fast.kernels.scaled_gradient import scaled_gradient


def run_chunks(
    tokens: Tokens, settings: ChunkSettings, needs: Needs, *, max_bytes: int, backend: str
) -> tuple[Tensor, HeadGradients]:
    """Terms [NUM_TERMS, T] and gradients, chunk by chunk."""
    head = settings.head
    terms = tokens.inverse_temperature.new_empty(NUM_TERMS, tokens.labels.numel())
    run_chunk = _way(settings.logits_dtype, backend)

    def grad_logits(rows: slice, _: slice) -> Tensor:
        terms[:, rows], gradient = run_chunk(tokens.take(rows), settings)
        return head.weight.new_empty(0) if gradient is None else gradient

    size = max_bytes // logits_bytes(head.weight, backend)
    gradients = head_gradients(
        tokens.hidden,
        head.weight,
        needs,
        grad_logits,
        even_slices(tokens.labels.numel(), size),
        [slice(0, head.weight.shape[0])],
        weight_dtype=compute_dtype(tokens.hidden.dtype),
        accum_dtype=torch.float32,
    )
    return terms, gradients


def _way(logits_dtype: str, backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if backend == "torch":
        return torch_chunk
    return tile_chunk if logits_dtype == "float32" else rounded_chunk


# Opaque to torch.compile, which so sees one node and none of the loop over chunks.
@torch.library.custom_op("gad_fast::linear_policy_loss", mutates_args=())
def _linear_policy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
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
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
    logits_dtype: str,
    max_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], terms [NUM_TERMS, T], and the gradients of hidden, weight and bias or empty ones."""
    inputs = PolicyInputs(old_logp, ref_logp, advantages, weights, is_weights)
    objective = PolicyObjective._make(
        (loss_type, clip_low, clip_high, clip_ratio_c, kl_coef, kl_type, entropy_coef)
    )
    # Autocast would round products that are to stay in float32.
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead(weight.to(hidden.dtype), bias, logit_scale, softcap)
        terms, gradients = run_chunks(
            Tokens(hidden, labels, inverse_temperature, inputs),
            ChunkSettings(head, objective, logits_dtype, any(needs)),
            Needs(*needs),
            max_bytes=max_bytes,
            backend=backend,
        )
    grad_bias = gradients.bias.to(hidden.dtype if bias is None else bias.dtype)
    return terms[0].sum(), terms, gradients.hidden, gradients.weight.to(weight.dtype), grad_bias


@_linear_policy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = Needs(*rest[14])
    return (
        inverse_temperature.new_empty(()),
        inverse_temperature.new_empty(NUM_TERMS, labels.numel()),
        torch.empty_like(hidden) if needs.hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs.weight else weight.new_empty(0),
        hidden.new_empty(0) if bias is None or not needs.bias else torch.empty_like(bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.backend = Needs(*inputs[19]), inputs[22]
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd would make zeros for every output that is no loss, as large as a gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    scaled = [
        scaled_gradient(torch.atleast_2d(grad), grad_outputs[0], ctx.backend).view_as(grad)
        if is_needed
        else None
        for grad, is_needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *scaled, *(None,) * 20


_linear_policy_op.register_autograd(_backward, setup_context=_setup_context)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logits_dtype: LogitsDtype = "float32",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_workspace_mb: float | None = None,
    backend: Backend = "auto",
    **options: Unpack[PolicyOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of the tokens that a head gives to hidden states, without whole logits.

    Differentiable once, in `hidden`, `weight` and `bias`; what needs no gradient costs none. Takes
    what `token_logprobs` and `policy_loss` take, and returns what the latter does.

    Args:
        hidden: `[..., D]`, bfloat16, float32 or float64; under autocast in its dtype.
        weight: `[V, D]`; in float32 it is cast once a call, and gets its gradient as it was summed.
        labels: `[...]`, int32 or int64.
        old_logp: `[...]`, or None on-policy.
        advantages: `[...]`, or one for each sequence.
        mask: `[...]`; tokens outside never reach the head (finding them waits for a GPU once).
        bias: `[V]`; logits are cap(logit_scale * (X W^T + bias)).
        temperature: above 0, a number or `[...]`; the logits are divided by it.
        logits_dtype: "bfloat16" rounds the logits as an engine with a bfloat16 head does.
        softcap: cap(u) is softcap * tanh(u / softcap), None for none.
        logit_scale: above 0.
        max_workspace_mb: what a chunk's logits may take; by default 64 on a CPU, else 1024.
        backend: "auto" is "triton" for bfloat16 on CUDA with D a multiple of 8, else "torch".
        options: `PolicyOptions`.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    hidden = autocast_hidden(hidden)
    head = checked_head(hidden, weight, bias, logit_scale, softcap, logits_dtype)
    call = HeadCall(temperature, logits_dtype, max_workspace_mb, backend)
    is_of_sequences = options.get("ratio_level") == "sequence" and old_logp is not None
    run = _through_logprobs if is_of_sequences else _in_chunks
    return run(Given(hidden, labels, old_logp, advantages, mask), head, call, options)


class Given(NamedTuple):
    """Tensors of the caller, in whatever shape they came."""

    hidden: Tensor
    labels: Tensor
    old_logp: Tensor | None
    advantages: Tensor
    mask: Tensor | None


def _in_chunks(
    given: Given, head: LinearHead, call: HeadCall, options: PolicyOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The way with the gradient in the forward pass."""
    objective = policy_objective(options)
    tokens, kept = _flat_tokens(given, head, call.temperature, options)
    loss, terms, *_ = _linear_policy_op(
        tokens.hidden, head.weight, head.bias, tokens.labels, tokens.inverse_temperature,
        *tokens.inputs, *objective, head.logit_scale, head.softcap,
        _needs(given.hidden, head.weight, head.bias), call.logits_dtype,
        workspace_bytes(call.max_workspace_mb, given.hidden.device),
        resolve_head_backend(given.hidden, head.weight, call.backend),
    )  # fmt: skip
    return loss, summarize(terms, kept, tokens.labels.numel())


def _flat_tokens(
    given: Given, head: LinearHead, temperature: float | Tensor, options: PolicyOptions
) -> tuple[Tokens, Tensor | None]:
    """The checked arguments, flat and without what the mask leaves out; and the mask still due.

    While compiling, where shapes must be known, all tokens stay, and with them the mask.
    """
    hidden, labels, old_logp, advantages, mask = given
    shape, device, dtype = hidden.shape[:-1], hidden.device, compute_dtype(hidden.dtype)
    kept = flat_mask(mask, shape, device)
    tokens = Tokens(
        hidden.reshape(-1, hidden.shape[-1]),
        flat_labels(labels, shape, head.weight.shape[0], kept, device),
        inverse_temperatures(temperature, shape, device, dtype),
        policy_inputs(
            old_logp, advantages, kept, shape=shape, device=device, dtype=dtype, options=options
        ),
    )
    if kept is None:
        return tokens, None
    if torch.compiler.is_compiling():
        return tokens._replace(labels=tokens.labels.where(kept, 0)), kept
    return tokens.take(kept.nonzero().squeeze(1)), None


def _through_logprobs(
    given: Given, head: LinearHead, call: HeadCall, options: PolicyOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The way over all log-probabilities, for ratios of whole sequences."""
    logp, entropy = linear_token_logprobs(
        given.hidden,
        head.weight,
        given.labels,
        bias=head.bias,
        mask=given.mask,
        ignore_index=None,  # as in the other way: the mask alone says what counts
        return_entropy=True,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=call.temperature,
        logits_dtype=call.logits_dtype,
        max_workspace_mb=call.max_workspace_mb,
        backend=call.backend,
    )
    if not options.get("entropy_coef"):
        entropy = entropy.detach()
    return policy_loss(
        logp, given.old_logp, given.advantages, given.mask, entropy=entropy, **options
    )


def _needs(*tensors: Tensor | None) -> list[bool]:
    is_on = torch.is_grad_enabled()
    return [is_on and tensor is not None and tensor.requires_grad for tensor in tensors]
