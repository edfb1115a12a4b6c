"""Log-probability of each label, and entropy of each row, under softmax(logits / temperature).

For one row of logits x, temperature t and label y, write z = x / t. Then

    p_j    = exp(z_j - lse)             lse = log sum_j exp(z_j)
    logp   = log p_y = z_y - lse
    H      = -sum_j p_j log p_j         with 0 log 0 = 0

From d lse / d z_j = p_j follow, with 1[j = y] the indicator of the label,

    d logp / d z_j = 1[j = y] - p_j
    d H    / d z_j = -p_j (log p_j + H)

and so, for upstream gradients g of logp and g_H of H,

    d loss / d x_j = (g (1[j = y] - p_j) - g_H p_j (log p_j + H)) / t

The backward pass needs the logits and three numbers a row: H, and lse as its two parts, max_j z_j
and log sum_j exp(z_j - max). They stay apart because their sum would have the rounding step of the
larger one, which for a confident label is as much as 1 - p. No [T, V] intermediate is kept.

Shapes: T tokens (all leading dimensions of the logits, flattened), V vocabulary.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gad_fast.kernels.chunked_torch import ChunkedTokenLogprobs, compute_dtype
from gad_fast.kernels.optional_triton import HAS_TRITON, IS_INTERPRETED, tl, triton

Backend = Literal["auto", "triton", "torch"]


def token_logprobs_reference(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by the book, differentiated by autograd: the truth in tests.

    Computes in float32, or in float64 when the logits are float64.

    Args:
        logits: `[..., V]`.
        labels: `[...]`, each in [0, V).
        temperature: above 0; the logits are divided by it.

    Returns:
        Log-probabilities and entropy in nats, both `[...]`.
    """
    z = logits.to(compute_dtype(logits)) / temperature
    log_p = torch.log_softmax(z, dim=-1)  # [..., V]
    p = log_p.exp()
    logprobs = log_p.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    # 0 * -inf would be NaN, in the value and in the gradient.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs, entropy


# The kernels take exponentials in base 2, the one the hardware has: exp(z) = exp2(x * scale) with
# scale = log2(e) / temperature.
_LN_2 = tl.constexpr(math.log(2.0))
_MINUS_INFINITY = tl.constexpr(-math.inf)
# Where the running maximum starts. Finite, so that a block of nothing but -inf gives exp2(-inf) = 0
# and not exp2(-inf + inf) = NaN; below any real logit, so that very negative rows do not underflow.
_LOWEST_MAXIMUM = tl.constexpr(-1e30)

_MAX_FORWARD_BLOCK = 8192
_MAX_BACKWARD_BLOCK = 4096
# 16 columns a thread. tests/kernels/test_ahead_of_time.py checks that they stay in registers.
_COLUMNS_PER_WARP = 512


@triton.jit
def _fwd_kernel(
    logits,  # [T, V], rows `row_stride` apart
    labels,  # [T]
    logprobs,  # [T]
    entropy,  # [T]
    maximum,  # [T], of the logits as they are
    log2_total,  # [T], base-2 log of the sum of exp(z - max)
    row_stride,
    V,
    scale,
    BLOCK_V: tl.constexpr,
):
    """One program a row: reads it once, keeping maximum, sum and weighted sum as it goes.

    The entropy is not optional: it takes a multiply-add on values already in registers, in a loop
    bound by its loads.
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_row = logits + i_t * row_stride
    # Before the loop, so that its latency passes while the loop runs.
    label_logit = tl.load(p_row + tl.load(labels + i_t)).to(tl.float32)

    running_max = _LOWEST_MAXIMUM
    total = 0.0  # sum of e_j = exp2((x_j - running_max) * scale)
    weighted = 0.0  # sum of e_j * (x_j - running_max) * scale; unshifted, it would cancel in H
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        # The tail must be -inf before the maximum: as zeros it would be phantom tokens.
        b_x = tl.load(
            p_row + o_v, mask=o_v < V, other=_MINUS_INFINITY, eviction_policy="evict_first"
        ).to(tl.float32)
        new_max = tl.maximum(running_max, tl.max(b_x, 0))
        # Subtracting before scaling keeps the difference exact however large the logits are.
        b_z = (b_x - new_max) * scale
        b_e = tl.exp2(b_z)
        b_weighted = tl.where(b_e > 0, b_e * b_z, 0.0)  # 0 * -inf is NaN
        shift = (running_max - new_max) * scale
        rescale = tl.exp2(shift)
        weighted = (weighted + shift * total) * rescale + tl.sum(b_weighted, 0)
        total = total * rescale + tl.sum(b_e, 0)
        running_max = new_max

    b_log2_total = tl.log2(total)
    tl.store(logprobs + i_t, ((label_logit - running_max) * scale - b_log2_total) * _LN_2)
    tl.store(entropy + i_t, (b_log2_total - weighted / total) * _LN_2)
    tl.store(maximum + i_t, running_max)
    tl.store(log2_total + i_t, b_log2_total)


@triton.jit
def _bwd_kernel(
    logits,  # [T, V], rows `row_stride` apart
    labels,  # [T]
    entropy,  # [T]
    maximum,  # [T]
    log2_total,  # [T]
    grad_logprobs,  # [T]
    grad_entropy,  # [T]
    grad_logits,  # [T, V], contiguous
    row_stride,
    V,
    scale,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
):
    """One program a block of a row, all on grid axis 0, because the other axes end at 65535."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    i_t = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_v = tl.program_id(0) % num_blocks
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V

    grad_logp = tl.load(grad_logprobs + i_t)
    grad_h = tl.load(grad_entropy + i_t)
    # A row that no loss looks at (prompt, padding) is not read: as -inf it gives p = 0, gradient 0.
    is_used = (grad_logp != 0) | (grad_h != 0)
    b_x = tl.load(
        logits + i_t * row_stride + o_v,
        mask=m_v & is_used,
        other=_MINUS_INFINITY,
        eviction_policy="evict_first",
    ).to(tl.float32)
    b_log2_p = (b_x - tl.load(maximum + i_t)) * scale - tl.load(log2_total + i_t)
    b_p = tl.exp2(b_log2_p)
    # The label's entry is finished in fp32 before the one store: p - 1 of a p rounded to bf16 loses
    # most of the gradient of a confident token.
    label = tl.load(labels + i_t).to(tl.int32)
    b_grad = grad_logp * (tl.where(o_v == label, 1.0, 0.0) - b_p)
    b_surprise = b_log2_p * _LN_2 + tl.load(entropy + i_t)
    b_grad -= grad_h * tl.where(b_p > 0, b_p * b_surprise, 0.0)  # 0 * -inf is NaN
    b_grad *= inverse_temperature
    p_grad = grad_logits + i_t * V + o_v
    tl.store(p_grad, b_grad.to(grad_logits.dtype.element_ty), mask=m_v)


def _launch_config(V: int, max_block: int) -> dict[str, Any]:
    """Block and warps for a vocabulary: a plain function, so that no launch needs an autotuner."""
    block = min(max_block, max(128, triton.next_power_of_2(V)))
    return {"BLOCK_V": block, "num_warps": max(1, block // _COLUMNS_PER_WARP)}


# Opaque to torch.compile, which so sees one node, and cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::token_logprobs", mutates_args=())
def _forward_op(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy, maximum and log2_total, all `[T]`, of logits `[T, V]`."""
    T, V = logits.shape
    logits = _with_unit_column_stride(logits)
    outputs = _empty_outputs(logits)
    if T > 0:
        with torch.cuda.device_of(logits):
            _fwd_kernel[(T,)](
                logits,
                labels.contiguous(),
                *outputs,
                logits.stride(0),
                V,
                math.log2(math.e) / temperature,
                **_launch_config(V, _MAX_FORWARD_BLOCK),
            )
    return outputs


@_forward_op.register_fake
def _(logits: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(logits)


def _empty_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty() -> Tensor:
        return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)

    return empty(), empty(), empty(), empty()


@torch.library.custom_op("gad_fast::token_logprobs_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log2_total: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
) -> Tensor:
    """Gradient `[T, V]` of the logits, in their dtype."""
    T, V = logits.shape
    logits = _with_unit_column_stride(logits)
    grad_logits = torch.empty(T, V, dtype=logits.dtype, device=logits.device)
    if T > 0:
        config = _launch_config(V, _MAX_BACKWARD_BLOCK)
        with torch.cuda.device_of(logits):
            _bwd_kernel[(T * triton.cdiv(V, config["BLOCK_V"]),)](
                logits,
                labels.contiguous(),
                entropy,
                maximum,
                log2_total,
                grad_logprobs.contiguous(),
                grad_entropy.contiguous(),
                grad_logits,
                logits.stride(0),
                V,
                math.log2(math.e) / temperature,
                1.0 / temperature,
                **config,
            )
    return grad_logits


@_backward_op.register_fake
def _(logits: Tensor, *_rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.temperature = inputs
    _, entropy, maximum, log2_total = output
    ctx.mark_non_differentiable(maximum, log2_total)
    ctx.save_for_backward(logits, labels, entropy, maximum, log2_total)


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
    # Where no loss uses an output, its gradient is zeros [T]: cheaper than a second kernel.
    grad_logprobs, grad_entropy = grad_outputs[:2]
    args = (*ctx.saved_tensors, grad_logprobs, grad_entropy, ctx.temperature)
    return _backward_op(*args), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _with_unit_column_stride(logits: Tensor) -> Tensor:
    """Return the logits themselves if only their rows are strided, else a copy."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


_TRITON_DTYPES = (torch.float32, torch.bfloat16)


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, and if asked the entropy of each row, of softmax(logits / t).

    Both results are differentiable once with respect to the logits, on either path, and keep the
    logits and a few numbers a row for that. An entropy that no loss uses adds nothing to the
    backward pass; detach it where it outlives the step as a metric, or it keeps the logits alive.

    Args:
        logits: `[..., V]`. Where the leading dimensions do not flatten into one stride, as in
            `logits[:, :-1]`, a copy is made; dropping the last label instead of the last logit, or
            packing the tokens as `[T, V]`, avoids it.
        labels: `[...]`, int32 or int64, each in [0, V). Not checked, because that would wait for
            the device: a label outside reads memory it should not. Tokens to be ignored need a
            valid label too, and a zero weight in the loss.
        temperature: above 0; the logits are divided by it.
        return_entropy: whether to return the entropy too.
        backend: "auto" is "triton" for float32 or bfloat16 logits on CUDA where Triton is
            installed, and "torch" otherwise.

    Returns:
        Log-probabilities `[...]` in float32 (float64 for float64 logits), or the pair of them and
        the entropy in nats, which is likewise `[...]`.

    Raises:
        ValueError: the shapes or dtypes do not fit, the temperature is not above 0, or the Triton
            backend is asked for where it cannot run.
    """
    if logits.shape[:-1] != labels.shape:
        expected, actual = tuple(logits.shape[:-1]), tuple(labels.shape)
        msg = f"labels must have one entry for each row of logits, {expected}, got {actual}"
        raise ValueError(msg)
    if labels.dtype not in (torch.int32, torch.int64):
        msg = f"labels must be int32 or int64, got {labels.dtype}"
        raise ValueError(msg)
    if not temperature > 0:
        msg = f"temperature must be above 0, got {temperature}"
        raise ValueError(msg)

    rows, row_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)  # [T, V], [T]
    if _resolve_backend(logits, backend) == "triton":
        logprobs, entropy, _, _ = _forward_op(rows, row_labels, temperature)
    else:
        logprobs, entropy = ChunkedTokenLogprobs.apply(
            rows, row_labels.long(), temperature, return_entropy
        )
    logprobs = logprobs.reshape(labels.shape)
    return (logprobs, entropy.reshape(labels.shape)) if return_entropy else logprobs


def _resolve_backend(logits: Tensor, backend: Backend) -> Literal["triton", "torch"]:
    is_runnable = HAS_TRITON and logits.dtype in _TRITON_DTYPES
    if backend == "auto":
        return "triton" if is_runnable and logits.is_cuda else "torch"
    if backend == "triton" and not (is_runnable and (logits.is_cuda or IS_INTERPRETED)):
        msg = (
            "backend 'triton' needs Triton and float32 or bfloat16 logits on CUDA, "
            f"got {logits.dtype} on {logits.device} (use backend='torch')"
        )
        raise ValueError(msg)
    return backend
