"""Launches of the kernels of linear_kernels.py: plain functions, without autograd.

`linear_stats` gives what a loss needs of each row. The gradient of the logits then comes from
`linear_grad_slice`, which makes them again for a slice of the vocabulary, or from `exp_to_grad`,
which turns the exponentials that `linear_stats` was asked to store into it.

Shapes: T tokens that a loss looks at, D width, V vocabulary, J tiles of the vocabulary.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.linear_head import LinearHead
from gad_fast.kernels.linear_kernels import (
    exp_to_grad_kernel,
    linear_grad_kernel,
    linear_stats_kernel,
    merge_stats_kernel,
)
from gad_fast.kernels.optional_triton import HAS_TRITON


class RowStats(NamedTuple):
    """What is known of T rows of logits, each [T]; float32 from the kernels."""

    logp: Tensor
    entropy: Tensor
    """In nats."""
    maximum: Tensor
    """Largest v of the row."""
    log_total: Tensor
    """Log of the sum of exp((v - maximum) / t); apart, since the sum of the two would round it."""


class Tile(NamedTuple):
    """The launch configuration of one kernel."""

    BLOCK_T: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    HAS_TMA: bool = True


TileKernel = Literal["stats", "stats_exp", "grad", "grad_shaped"]
"""stats_exp stores exponentials, grad_shaped is for logits that are capped or rounded: both take
more registers."""

# By compute capability: from Hopper on, and before. docs/kernel_registers.md has what each uses.
TILES: dict[tuple[int, TileKernel], Tile] = {
    (90, "stats"): Tile(128, 256, 64, num_warps=8, num_stages=4),
    (90, "stats_exp"): Tile(128, 128, 64, num_warps=4, num_stages=3),
    (90, "grad"): Tile(128, 256, 64, num_warps=8, num_stages=4),
    (90, "grad_shaped"): Tile(128, 128, 64, num_warps=8, num_stages=4),
    (80, "stats"): Tile(128, 128, 32, num_warps=8, num_stages=4, HAS_TMA=False),
    (80, "stats_exp"): Tile(128, 128, 32, num_warps=8, num_stages=4, HAS_TMA=False),
    (80, "grad"): Tile(128, 128, 32, num_warps=8, num_stages=4, HAS_TMA=False),
    (80, "grad_shaped"): Tile(128, 128, 32, num_warps=8, num_stages=4, HAS_TMA=False),
}


def tile_of(kernel: TileKernel, device: torch.device) -> Tile:
    """The tile for a device: a plain function, so that no launch needs an autotuner."""
    # Compute capability 12 has no more shared memory than 8.
    is_large = device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)
    return TILES[90 if is_large else 80, kernel]


def num_tiles(kernel: TileKernel, V: int, device: torch.device) -> int:
    """J."""
    return _ceil_div(V, tile_of(kernel, device).BLOCK_V)


def merge_config() -> dict[str, Any]:
    """Few rows a program, so that there are programs enough for a GPU."""
    return {"BLOCK_T": 32, "BLOCK_J": 32, "num_warps": 4}


def exp_config(tile_width: int) -> dict[str, Any]:
    """16 columns a thread, of exponentials from tiles of that width."""
    return {"TILE_V": tile_width, "BLOCK_V": 4096, "num_warps": 8}


def can_tile(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can read these operands: bfloat16, in rows of a multiple of 16 bytes."""
    is_bfloat16 = hidden.dtype == torch.bfloat16 and weight.is_floating_point()
    is_new = not hidden.is_cuda or torch.cuda.get_device_properties(hidden.device).major >= 8
    return HAS_TRITON and is_bfloat16 and is_new and hidden.shape[-1] % 8 == 0


def resolve_head_backend(hidden: Tensor, weight: Tensor, backend: Backend) -> str:
    """As `resolve_backend`, for what the kernels can read; "auto" leaves the rest to torch."""
    path = resolve_backend(hidden, backend, dtypes=(torch.bfloat16,))
    if path == "triton" and not can_tile(hidden, weight):
        if backend == "auto":
            return "torch"
        msg = (
            f"backend 'triton' needs hidden with D a multiple of 8, got D={hidden.shape[-1]}, "
            "on compute capability 8 or more (use backend='torch')"
        )
        raise ValueError(msg)
    return path


def linear_stats(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    inverse_temperature: Tensor,
    *,
    logits_dtype: str = "float32",
    exponentials: Tensor | None = None,
) -> tuple[RowStats, Tensor]:
    """What a loss needs of each row, and the maxima of its tiles [J, T].

    Args:
        hidden: bfloat16 `[T, D]`; see `can_tile`.
        head: weight `[V, D]` in bfloat16.
        labels: int64 `[T]`; one outside [0, V) gives a log-probability of NaN.
        inverse_temperature: float32 `[T]`.
        logits_dtype: "bfloat16" rounds the logits as an engine with a bfloat16 head does.
        exponentials: bfloat16 `[T, V]`, rows may be strided; filled for `exp_to_grad` if given.

    Raises:
        ValueError: exponentials are to be stored under a softcap, whose derivative would have to
            come from their rounded logarithms.
    """
    if exponentials is not None and head.softcap is not None:
        msg = f"exponentials cannot be stored with a softcap, got {head.softcap:g} (recompute them)"
        raise ValueError(msg)
    (T, D), V = hidden.shape, head.weight.shape[0]
    name = "stats" if exponentials is None else "stats_exp"
    tile, J = tile_of(name, hidden.device), num_tiles(name, V, hidden.device)
    # Each number by itself, because the maxima may be kept for long.
    maximum, total, weighted = (
        torch.empty(J, T, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    # What no tile writes, because no tile has the label, stays NaN.
    label_logits = torch.full_like(inverse_temperature, torch.nan)
    if T > 0:
        with torch.cuda.device_of(hidden):
            linear_stats_kernel[(_ceil_div(T, tile.BLOCK_T) * J,)](
                *_operand(hidden, tile, tile.BLOCK_T),
                *_operand(head.weight, tile, tile.BLOCK_V),
                None if head.bias is None else head.bias.contiguous(),
                labels, inverse_temperature, maximum, total, weighted, label_logits,
                exponentials, 0 if exponentials is None else exponentials.stride(0),
                T, V, D, head.logit_scale, head.softcap, **_constants(tile, logits_dtype),
            )  # fmt: skip
    return _merged(maximum, total, weighted, label_logits, inverse_temperature), maximum


def _merged(
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    label_logits: Tensor,
    inverse_temperature: Tensor,
) -> RowStats:
    """The numbers of rows from those of their tiles, [J, T] each."""
    J, T = maximum.shape
    stats = RowStats(*(torch.empty_like(label_logits) for _ in RowStats._fields))
    config = merge_config()
    if T > 0:
        with torch.cuda.device_of(maximum):
            merge_stats_kernel[(_ceil_div(T, config["BLOCK_T"]),)](
                maximum, total, weighted, label_logits, inverse_temperature, *stats, T, J, **config
            )
    return stats


def linear_grad_slice(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    inverse_temperature: Tensor,
    stats: RowStats,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    columns: slice,
    *,
    logits_dtype: str = "float32",
) -> Tensor:
    """Gradient of the logits of a slice of the vocabulary, bfloat16 `[T, W]`, made from nothing.

    Args:
        hidden: as in `linear_stats`.
        head: as there, of the whole vocabulary.
        labels: as there.
        inverse_temperature: as there.
        stats: what it gave.
        grad_logp: float32 `[T]`, upstream.
        grad_entropy: float32 `[T]`, upstream, or None.
        columns: from start to stop; as fast as it can be where both are multiples of 256.
        logits_dtype: as there.
    """
    weight = head.weight[columns]
    (T, D), W = hidden.shape, weight.shape[0]
    is_shaped = head.softcap is not None or logits_dtype == "bfloat16"
    tile = tile_of("grad_shaped" if is_shaped else "grad", hidden.device)
    grad_logits = torch.empty(T, W, dtype=torch.bfloat16, device=hidden.device)
    if T > 0:
        num_programs = _ceil_div(T, tile.BLOCK_T) * _ceil_div(W, tile.BLOCK_V)
        with torch.cuda.device_of(hidden):
            linear_grad_kernel[(num_programs,)](
                *_operand(hidden, tile, tile.BLOCK_T),
                *_operand(weight, tile, tile.BLOCK_V),
                None if head.bias is None else head.bias[columns].contiguous(),
                labels, inverse_temperature, *stats[1:], grad_logp, grad_entropy, grad_logits,
                T, W, D, columns.start, head.logit_scale, head.softcap,
                **_constants(tile, logits_dtype),
            )  # fmt: skip
    return grad_logits


def exp_to_grad(
    exponentials: Tensor,
    head: LinearHead,
    labels: Tensor,
    inverse_temperature: Tensor,
    stats: RowStats,
    tile_maximum: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Turns the exponentials that `linear_stats` stored into the gradient of the logits, in place.

    The gradient has the relative precision of the exponentials, that of bfloat16.

    Args:
        exponentials: bfloat16 `[T, V]`, overwritten and returned.
        head: as in `linear_stats`.
        labels: as there.
        inverse_temperature: as there.
        stats: what it gave.
        tile_maximum: what it gave besides.
        grad_logp: float32 `[T]`, upstream.
        grad_entropy: float32 `[T]`, upstream, or None.
    """
    T, V = exponentials.shape
    config = exp_config(tile_of("stats_exp", exponentials.device).BLOCK_V)
    if T > 0:
        with torch.cuda.device_of(exponentials):
            exp_to_grad_kernel[(T * _ceil_div(V, config["BLOCK_V"]),)](
                exponentials,
                exponentials.stride(0),
                labels,
                inverse_temperature,
                *stats[1:],
                tile_maximum,
                grad_logp,
                grad_entropy,
                T,
                V,
                head.logit_scale,
                **config,
            )
    return exponentials


def _constants(tile: Tile, logits_dtype: str) -> dict[str, Any]:
    return {"IS_ROUNDED": logits_dtype == "bfloat16", **tile._asdict()}


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def _operand(matrix: Tensor, tile: Tile, num_rows: int) -> tuple[Any, int]:
    """What a kernel loads blocks of so many rows from, and the stride of its rows."""
    stride, unit = matrix.stride()
    is_aligned = unit == 1 and stride >= matrix.shape[1] and stride % 8 == 0
    if not is_aligned or matrix.data_ptr() % 16 != 0:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    if not tile.HAS_TMA:
        return matrix, matrix.stride(0)
    # Here, because only a launch needs it, and a launch has Triton.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [num_rows, tile.BLOCK_D]), matrix.stride(0)
