"""The opaque operation behind `linear_token_logprobs`: which tokens, in which parts, on which path.

Shapes: T tokens, of which a mask keeps K; D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.chunked_linear import (
    Needs,
    even_slices,
    head_gradients,
    torch_linear_grad,
    torch_linear_stats,
)
from gad_fast.kernels.linear_head import LinearHead, logits_bytes
from gad_fast.kernels.linear_tiles import RowStats, linear_grad_slice, linear_stats, num_tiles

# Narrower slices would spend their time on adding up dX, which each of them reads and writes.
_MIN_SLICE = 4096
# Whole tiles.
_ROW_MULTIPLE, _COLUMN_MULTIPLE = 128, 256


class Settings(NamedTuple):
    """The arguments that are no tensors; in the order in which the operations take them."""

    logit_scale: float
    softcap: float | None
    logits_dtype: str
    has_entropy: bool
    accum_dtype: torch.dtype
    workspace_bytes: int
    backend: str

    def head(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LinearHead:
        """The head, its weight in the dtype of the hidden states."""
        return LinearHead(weight.to(dtype), bias, self.logit_scale, self.softcap)


class Kept(NamedTuple):
    """Which of T tokens count."""

    index: Tensor
    """int64 [T], of which the first `count` hold; empty where all tokens count."""
    count: Tensor
    """K, on the host, so that the backward pass does not wait for the device."""

    def select(self, values: Tensor) -> Tensor:
        """Rows of the tokens that count, [K, ...]."""
        count = int(self.count)
        if count == values.shape[0]:
            return values.contiguous()
        return values.index_select(0, self.index[:count])

    def spread(self, values: Tensor, T: int) -> Tensor:
        """Rows [T, ...]: the values given back to their tokens, and 0 to the others."""
        count = int(self.count)
        if count == T:
            return values
        return values.new_zeros(T, *values.shape[1:]).index_copy_(0, self.index[:count], values)


def kept_tokens(mask: Tensor | None, labels: Tensor) -> Kept:
    """What a mask keeps. The one place that waits for the device, and only with a mask."""
    T = labels.numel()
    if mask is None:
        return Kept(labels.new_empty(0), torch.tensor(T))
    index = mask.nonzero().squeeze(1)
    return Kept(torch.nn.functional.pad(index, (0, T - index.numel())), torch.tensor(index.numel()))


class Tokens(NamedTuple):
    """Tokens that reach the head."""

    hidden: Tensor
    """[K, D]."""
    labels: Tensor
    """[K]."""
    inverse_temperature: Tensor
    """[K]."""

    def of(self, rows: slice) -> "Tokens":
        """Some of the tokens."""
        return Tokens(self.hidden[rows], self.labels[rows], self.inverse_temperature[rows])


# Opaque to torch.compile, which so sees one node and none of the loop over parts.
@torch.library.custom_op("gad_fast::linear_token_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    mask: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logits_dtype: str,
    has_entropy: bool,
    accum_dtype: torch.dtype,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of RowStats, 0 for tokens that do not count, each `[T]`; then those of Kept."""
    settings = Settings(
        logit_scale, softcap, logits_dtype, has_entropy, accum_dtype, workspace_bytes, backend
    )
    kept, T = kept_tokens(mask, labels), labels.numel()
    # Autocast would round products that are to stay in float32.
    with torch.autocast(hidden.device.type, enabled=False):
        head = settings.head(weight, bias, hidden.dtype)
        tokens = Tokens(*map(kept.select, (hidden, labels, inverse_temperature)))
        blocks = _stats_blocks(int(kept.count), head.weight, settings)
        parts = [_stats(tokens.of(rows), head, settings) for rows in blocks]
    logp, entropy, maximum, log_total = (
        kept.spread(torch.cat(values), T) for values in zip(*parts, strict=True)
    )
    return logp, entropy, maximum, log_total, kept.index, kept.count


def _stats(tokens: Tokens, head: LinearHead, settings: Settings) -> RowStats:
    args = (tokens.hidden, head, tokens.labels, tokens.inverse_temperature)
    if settings.backend == "triton":
        return linear_stats(*args, logits_dtype=settings.logits_dtype)[0]
    return torch_linear_stats(
        *args, logits_dtype=settings.logits_dtype, has_entropy=settings.has_entropy
    )


def _stats_blocks(K: int, weight: Tensor, settings: Settings) -> list[slice]:
    """Blocks of tokens whose numbers of tiles, or logits, fit into the workspace."""
    V, workspace = weight.shape[0], settings.workspace_bytes
    if settings.backend == "torch":
        return even_slices(K, workspace // logits_bytes(weight, "torch"))
    row_bytes = 3 * torch.float32.itemsize * num_tiles("stats", V, weight.device)
    return even_slices(K, workspace // row_bytes, multiple=_ROW_MULTIPLE)


@linear_logprobs_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels, inverse_temperature, mask = args[3:6]

    def empty() -> Tensor:
        return torch.empty_like(inverse_temperature)

    index = labels.new_empty(0 if mask is None else labels.numel())
    count = torch.empty((), dtype=torch.int64, device="cpu")
    return empty(), empty(), empty(), empty(), index, count


@torch.library.custom_op("gad_fast::linear_token_logprobs_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    stats: list[Tensor],
    index: Tensor,
    count: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logits_dtype: str,
    has_entropy: bool,
    accum_dtype: torch.dtype,
    workspace_bytes: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; empty where not needed."""
    settings = Settings(
        logit_scale, softcap, logits_dtype, has_entropy, accum_dtype, workspace_bytes, backend
    )
    kept, T = Kept(index, count), labels.numel()
    head = settings.head(weight, bias, hidden.dtype)
    tokens = Tokens(*map(kept.select, (hidden, labels, inverse_temperature)))
    stats = [kept.select(values) for values in stats]
    grad_logp = kept.select(grad_logp)
    grad_entropy = None if grad_entropy is None else kept.select(grad_entropy)

    def grad_logits(rows: slice, columns: slice) -> Tensor:
        known = RowStats(*(values[rows] for values in stats))
        upstream = grad_logp[rows], None if grad_entropy is None else grad_entropy[rows]
        return _grad_logits(tokens.of(rows), head, known, upstream, columns, settings)

    blocks, slices = _grad_parts(int(count), head.weight, settings)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = head_gradients(
            tokens.hidden, head.weight, Needs(*needs), grad_logits, blocks, slices,
            weight_dtype=weight.dtype, accum_dtype=accum_dtype,
        )  # fmt: skip
    grad_hidden = grads.hidden.to(hidden.dtype)
    return (
        kept.spread(grad_hidden, T) if needs[0] else grad_hidden,
        grads.weight.to(weight.dtype),
        grads.bias.to((weight if bias is None else bias).dtype),
    )


def _grad_logits(
    tokens: Tokens,
    head: LinearHead,
    stats: RowStats,
    upstream: tuple[Tensor, Tensor | None],
    columns: slice,
    settings: Settings,
) -> Tensor:
    args = (tokens.hidden, head, tokens.labels, tokens.inverse_temperature, stats, *upstream)
    if settings.backend == "triton":
        return linear_grad_slice(*args, columns, logits_dtype=settings.logits_dtype)
    return torch_linear_grad(*args, logits_dtype=settings.logits_dtype)


def _grad_parts(K: int, weight: Tensor, settings: Settings) -> tuple[list[slice], list[slice]]:
    """Blocks of tokens and slices of the vocabulary whose dZ fits into the workspace.

    The kernels take all tokens together where they can: each slice of dW is then one product.
    """
    V, workspace = weight.shape[0], settings.workspace_bytes
    if settings.backend == "torch":
        return even_slices(K, workspace // logits_bytes(weight, "torch")), [slice(0, V)]
    itemsize = torch.bfloat16.itemsize
    blocks = even_slices(K, workspace // (itemsize * _MIN_SLICE), multiple=_ROW_MULTIPLE)
    column_bytes = itemsize * max(1, blocks[0].stop)
    return blocks, even_slices(V, workspace // column_bytes, multiple=_COLUMN_MULTIPLE)


@_backward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = Needs(*rest[-1])
    return (
        hidden.new_empty(hidden.shape if needs.hidden else 0),
        weight.new_empty(weight.shape if needs.weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs.bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, inverse_temperature, _mask, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[2:])
    # Else an entropy that no loss uses would come back as zeros, and cost its share of the work.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, inverse_temperature, *output)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy = grad_outputs[:2]
    if grad_logp is None and grad_entropy is None:
        return (None,) * 13
    inputs, stats, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:9], ctx.saved_tensors[9:]
    if grad_logp is None:
        grad_logp = torch.zeros_like(stats[0])
    needs = list(ctx.needs_input_grad[:3])
    upstream = (grad_logp, grad_entropy)
    grads = _backward_op(*inputs, list(stats), *kept, *upstream, *ctx.settings, needs)
    wanted = (grad if is_needed else None for grad, is_needed in zip(grads, needs, strict=True))
    return *wanted, *(None,) * 10


linear_logprobs_op.register_autograd(_backward, setup_context=_setup_context)
