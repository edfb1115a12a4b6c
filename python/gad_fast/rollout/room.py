"""Whether the memory for keys and values is there, before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gad_fast.errors import EngineError

KEPT_FREE = 0.1
"""Share of the free memory that the cache leaves to the forward pass."""


def one_token_cache(model: PreTrainedModel, device: torch.device) -> DynamicCache:
    """A cache of one token, which shows what each layer keeps."""
    cache = DynamicCache()
    language_model: Any = model
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        language_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def keys_and_values(cache: DynamicCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of each layer."""
    layer: Any
    for layer in cache.layers:
        yield layer.keys, layer.values


def product_dtype(like: Tensor) -> torch.dtype:
    """What attention multiplies in: under autocast, not what a layer hands over."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def require_room(like: DynamicCache, *, num_rows: int, num_columns: int) -> None:
    """Raises EngineError, with the number of rows that fit, when memory for them is not free.

    Args:
        like: a cache of one token.
        num_rows: rollouts at once.
        num_columns: tokens of each.
    """
    tensors = [tensor for pair in keys_and_values(like) for tensor in pair]
    bytes_a_row = num_columns * sum(t.numel() * product_dtype(t).itemsize for t in tensors)
    free = _free_bytes(tensors[0].device) * (1 - KEPT_FREE)
    if num_rows * bytes_a_row > free:
        rows = int(free // bytes_a_row)
        raise EngineError(
            f"{num_rows} rollouts of {num_columns} tokens need {num_rows * bytes_a_row / 2**30:.1f}"
            f" GiB of cache, but {free / 2**30:.1f} GiB are free: {rows} rollouts fit "
            f"(set max_sequences = {max(rows, 1)})"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
