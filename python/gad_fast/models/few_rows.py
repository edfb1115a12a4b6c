"""Products of few rows with large weights on a CPU, in blocks of columns.

MKL, which multiplies float32 for torch on x86, hardly spreads the few rows of a decode step over
its threads; the same columns as a batch of smaller products it does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gad_fast.models.layers import forwards_replaced

MOST_ROWS = 64
"""Above it, one product is as fast."""
BLOCK_COLUMNS = range(64, 4097)
"""Of a block."""
SMALLEST_WEIGHTS = 2**16
"""Weights with fewer elements, as those of adapters, are multiplied as they are."""


def few_row_products(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, linear layers with float32 weights on a CPU take few rows in blocks of columns.

    For passes without gradients. Where products are not MKL's, as under autocast, it does nothing.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if torch.backends.mkl.is_available() and not torch.is_autocast_enabled("cpu"):
        forwards = {
            layer: functools.partial(_linear, layer, count)
            for layer in model.modules()
            if type(layer) is nn.Linear and (count := _num_blocks(layer.weight)) > 1
        }
    return forwards_replaced(forwards)


def in_blocks(rows: Tensor, weight: Tensor, bias: Tensor | None, num_blocks: int) -> Tensor:
    """`linear(rows, weight, bias)` as so many products.

    Args:
        rows: [..., K].
        weight: [C, K], C a multiple of `num_blocks`.
        bias: [C].
        num_blocks: of columns.
    """
    flat = rows.reshape(1, -1, rows.shape[-1]).expand(num_blocks, -1, -1)
    blocks = weight.view(num_blocks, -1, weight.shape[1]).transpose(1, 2)
    if bias is None:
        products = torch.bmm(flat, blocks)
    else:
        products = torch.baddbmm(bias.view(num_blocks, 1, -1), flat, blocks)
    return products.transpose(0, 1).reshape(*rows.shape[:-1], len(weight))


def _linear(layer: nn.Linear, num_blocks: int, rows: Tensor) -> Tensor:
    if rows.numel() > MOST_ROWS * rows.shape[-1]:
        return functional.linear(rows, layer.weight, layer.bias)
    return in_blocks(rows, layer.weight, layer.bias, num_blocks)


def _num_blocks(weight: Tensor) -> int:
    """The fewest blocks of such widths that all threads have as many of; 1 where there are none."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return 1
    if weight.numel() < SMALLEST_WEIGHTS:
        return 1
    columns, threads = len(weight), torch.get_num_threads()
    fitting = (
        count
        for count in range(threads, columns + 1, threads)
        if columns % count == 0 and columns // count in BLOCK_COLUMNS
    )
    return next(fitting, 1)
