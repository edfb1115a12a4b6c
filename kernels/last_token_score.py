"""One score a sequence: the scalar head applied to the hidden state of the last token only.

    score_b = w . h_(b, last of b) + bias

Classifiers of transformers project all positions and pick one afterwards; this reads one row of D
numbers a sequence. The last token is that of a length, of a mask (so padding on the left works), or
of the offsets of packed sequences; or the caller has gathered the rows already.

Derivatives, for upstream gradients g_b:

    d loss / d h_(b, last) = g_b w, and 0 elsewhere
    d loss / d w = sum_b g_b h_(b, last)          d loss / d bias = sum_b g_b

For them the forward pass keeps the B rows it read, so that no [B, L, D] outlives it on its account.
A sequence without a token has no score: NaN, with no gradient, and an error where looking is free.

Shapes: B sequences, L columns or T packed tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor

from gad_fast.kernels.arguments import check_device, check_float, compute_dtype
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.optional_triton import tl, triton
from gad_fast.kernels.sequence_ends import Ends, checked_sequences, last_row


def last_token_score_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ends: Ends
) -> Tensor:
    """Scores by the book, differentiated by autograd: the truth in tests.

    Args:
        hidden: `[B, L, D]`, or `[1, T, D]` packed.
        weight: `[D]`.
        bias: `[1]`, or None.
        ends: which tokens are last; every sequence must have one.
    """
    scores = hidden.flatten(0, 1)[ends.rows(hidden)] @ weight
    return scores if bias is None else scores + bias


@triton.jit
def score_kernel(
    hidden,  # [B, L, D], or [1, T, D] packed; columns next to each other
    weight,  # [D]
    bias,  # [1], or None
    lengths,  # [B], or None
    attention_mask,  # [B, L], or None
    cu_seqlens,  # [B + 1], or None
    scores,  # [B]
    rows,  # [B]
    last_hidden,  # [B, D]
    sequence_stride,
    token_stride,
    L,
    D,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a sequence: finds its last token, and keeps the row it takes the product of."""
    i_b = tl.program_id(0).to(tl.int64)
    row = last_row(lengths, attention_mask, cu_seqlens, i_b, L, BLOCK_L)
    is_there = row >= 0
    p_row = hidden + (row // L) * sequence_stride + (row % L) * token_stride
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_h = tl.load(p_row + o_d, mask=m_d & is_there, other=0.0)
        tl.store(last_hidden + i_b * D + o_d, b_h, mask=m_d)
        b_w = tl.load(weight + o_d, mask=m_d, other=0.0)
        b_sum += b_h.to(tl.float32) * b_w.to(tl.float32)
    score = tl.sum(b_sum, 0)
    if bias is not None:
        score += tl.load(bias).to(tl.float32)
    tl.store(scores + i_b, tl.where(is_there, score, float("nan")))
    tl.store(rows + i_b, row)


@triton.jit
def score_backward_kernel(
    grad_scores,  # [B]
    rows,  # [B]
    last_hidden,  # [B, D]
    weight,  # [D]
    grad_hidden,  # [R, D], zeros; or None
    grad_weight,  # [D]
    B,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a block of columns, through all sequences, so that the sum needs no atomics."""
    o_d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad_w = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b_row = tl.load(rows + o_b, mask=o_b < B, other=-1)
        m_b = b_row >= 0
        m_bd = m_b[:, None] & m_d[None, :]
        b_g = tl.load(grad_scores + o_b, mask=m_b, other=0.0)
        p_last = last_hidden + o_b[:, None] * D + o_d[None, :]
        b_h = tl.load(p_last, mask=m_bd, other=0.0).to(tl.float32)
        b_grad_w += tl.sum(b_g[:, None] * b_h, 0)
        if grad_hidden is not None:
            p_grad = grad_hidden + b_row[:, None] * D + o_d[None, :]
            b_grad_h = b_g[:, None] * b_w[None, :]
            tl.store(p_grad, b_grad_h.to(grad_hidden.dtype.element_ty), mask=m_bd)
    tl.store(grad_weight + o_d, b_grad_w.to(grad_weight.dtype.element_ty), mask=m_d)


def launch_config(D: int) -> dict[str, Any]:
    """Blocks and warps for a width: a plain function, so that no launch needs an autotuner."""
    block = min(2048, max(128, triton.next_power_of_2(D)))
    return {"BLOCK_L": 1024, "BLOCK_D": block, "num_warps": max(1, block // 512)}


def backward_launch_config() -> dict[str, Any]:
    """Narrow blocks, so that one pass over few sequences still fills the device."""
    return {"BLOCK_B": 16, "BLOCK_D": 64, "num_warps": 2}


# Opaque to torch.compile, which so sees one node.
@torch.library.custom_op("gad_fast::last_token_score", mutates_args=())
def _score_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[B]`, rows `[B]` of the last tokens, and their hidden states `[B, D]`."""
    ends = Ends(lengths, attention_mask, cu_seqlens)
    if backend == "triton":
        return _launch(hidden, weight, bias, ends)
    rows, L = ends.rows(hidden), hidden.shape[1]
    at = rows.clamp_min(0)
    # What is read for a missing row may be NaN, which a gradient of 0 would not take away.
    last_hidden = hidden[at // L, at % L].masked_fill(rows[:, None] < 0, 0.0)
    dtype = _score_dtype(hidden, weight)
    scores = (last_hidden.to(dtype) * weight.to(dtype)).sum(1)
    if bias is not None:
        scores = scores + bias.to(dtype)
    return scores.masked_fill(rows < 0, float("nan")), rows, last_hidden


@_score_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, lengths: Any, attention_mask: Any, cu_seqlens: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del bias, backend
    return _empty_outputs(hidden, weight, Ends(lengths, attention_mask, cu_seqlens))


def _score_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return compute_dtype(torch.promote_types(hidden.dtype, weight.dtype))


def _empty_outputs(hidden: Tensor, weight: Tensor, ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
    B, D = ends.count(hidden), hidden.shape[2]
    return (
        hidden.new_empty(B, dtype=_score_dtype(hidden, weight)),
        hidden.new_empty(B, dtype=torch.int64),
        hidden.new_empty(B, D),
    )


def _launch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ends: Ends
) -> tuple[Tensor, Tensor, Tensor]:
    # Strided sequences and tokens are read where they are: a slice of [B, L, D] needs no copy.
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    _, L, D = hidden.shape
    outputs = _empty_outputs(hidden, weight, ends)
    given = (None if tensor is None else tensor.contiguous() for tensor in ends)
    tensors = hidden, weight.contiguous(), bias, *given, *outputs
    args: list[Any] = [*tensors, hidden.stride(0), hidden.stride(1), L, D]
    B = ends.count(hidden)
    if B > 0:
        with torch.cuda.device_of(hidden):
            score_kernel[(B,)](*args, **launch_config(D))
    return outputs


@torch.library.custom_op("gad_fast::last_token_score_backward", mutates_args=())
def _backward_op(
    grad_scores: Tensor,
    rows: Tensor,
    last_hidden: Tensor,
    weight: Tensor,
    num_rows: int,
    needs_hidden: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of all hidden states `[num_rows, D]`, or `[0, D]` unless needed, and of weight."""
    B, D = last_hidden.shape
    grad_hidden = last_hidden.new_zeros(num_rows if needs_hidden else 0, D)
    if backend == "torch":
        return grad_hidden, _torch_backward(grad_scores, rows, last_hidden, weight, grad_hidden)
    grad_weight = torch.empty(D, dtype=weight.dtype, device=weight.device)
    config = backward_launch_config()
    with torch.cuda.device_of(last_hidden):
        score_backward_kernel[(triton.cdiv(D, config["BLOCK_D"]),)](
            grad_scores.contiguous(), rows, last_hidden, weight.contiguous(),
            grad_hidden if needs_hidden else None, grad_weight, B, D, **config,
        )  # fmt: skip
    return grad_hidden, grad_weight


@_backward_op.register_fake
def _(
    grad_scores: Tensor, rows: Tensor, last_hidden: Tensor, weight: Tensor, num_rows: int,
    needs_hidden: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del grad_scores, rows, backend
    D = last_hidden.shape[1]
    return last_hidden.new_empty(num_rows if needs_hidden else 0, D), weight.new_empty(D)


def _torch_backward(
    grad_scores: Tensor, rows: Tensor, last_hidden: Tensor, weight: Tensor, grad_hidden: Tensor
) -> Tensor:
    """Gradient of the weight; adds that of the hidden states to zeros, unless there are none."""
    grads = grad_scores.masked_fill(rows < 0, 0.0)[:, None]
    if len(grad_hidden) > 0:
        # No token is last twice, so the order of adding is nothing to the sum.
        each = (grads * weight.to(grads.dtype)).to(grad_hidden.dtype)
        grad_hidden.index_add_(0, rows.clamp_min(0), each)
    return (grads * last_hidden.to(grads.dtype)).sum(0).to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    _, rows, last_hidden = output
    ctx.hidden_shape, ctx.backend = hidden.shape, inputs[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(rows, last_hidden)
    ctx.save_for_backward(rows, last_hidden, weight)


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    grad_scores = grad_outputs[0]
    rows, last_hidden, weight = ctx.saved_tensors
    num_rows, needs_hidden = ctx.hidden_shape[:2].numel(), ctx.needs_input_grad[0]
    grad_hidden, grad_weight = _backward_op(
        grad_scores, rows, last_hidden, weight, num_rows, needs_hidden, ctx.backend
    )
    grad_bias = None
    if ctx.bias_dtype is not None:
        grad_bias = grad_scores.masked_fill(rows < 0, 0.0).sum(0, keepdim=True).to(ctx.bias_dtype)
    return (
        grad_hidden.view(ctx.hidden_shape) if needs_hidden else None, grad_weight, grad_bias,
        None, None, None, None,
    )  # fmt: skip


_score_op.register_autograd(_backward, setup_context=_setup_context)


def last_token_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Score of each sequence: the scalar head applied to its last token, computed in float32.

    Differentiable once with respect to hidden, weight and bias. The gradient of hidden is dense,
    and zero but for B rows; where that costs too much, gather the rows and pass them as `[B, D]`.

    Args:
        hidden: `[B, L, D]` with `lengths` or `attention_mask`, packed `[T, D]` with `cu_seqlens`,
            or the rows of the last tokens, `[B, D]`, with none of the three.
        weight: `[D]` or `[1, D]`, of any float dtype.
        bias: one number, or None.
        lengths: int `[B]`, in [1, L], of sequences padded on the right.
        attention_mask: int or bool `[B, L]`, not 0 at tokens, padded on any side.
        cu_seqlens: int `[B + 1]`, where each packed sequence starts, and T.
        backend: "auto" is "triton" for float32 or bfloat16 on CUDA where Triton is installed, else
            "torch".

    Returns:
        Scores `[B]` in float32, or float64 where hidden or weight are. A sequence without a token
        is an error on a CPU; on a GPU, where looking would wait for the device, its score is NaN.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    ends = Ends(lengths, attention_mask, cu_seqlens)
    check_float("hidden", hidden)
    sequences = checked_sequences(hidden, ends)
    D = hidden.shape[-1]
    _check_head(hidden, weight, bias)
    flat_bias = None if bias is None else bias.reshape(1)
    # An empty tensor of the dtype that all is computed in, which decides where it can be.
    probe = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, weight.dtype))
    path = resolve_backend(probe, backend)
    return _score_op(sequences, weight.reshape(D), flat_bias, *ends, path)[0]


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    D = hidden.shape[-1]
    check_float("weight", weight)
    check_device("weight", weight, hidden.device)
    if weight.dim() not in (1, 2) or not weight.shape[-1] == weight.numel() == D:
        msg = f"weight must be [{D}] or [1, {D}], got {tuple(weight.shape)}"
        raise ValueError(msg)
    if bias is not None:
        check_float("bias", bias)
        check_device("bias", bias, hidden.device)
        if bias.numel() != 1:
            msg = f"bias must be one number, got {tuple(bias.shape)}"
            raise ValueError(msg)
