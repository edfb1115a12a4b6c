"""Attention of one new token a row, without a copy of the cache for each query head.

Heads that share keys (GQA) are, for one query, rows of one query matrix. transformers repeats keys
and values for each of them wherever there is a mask, which copies the whole cache in every layer.
A layer with a sliding window takes it off the mask, which is one for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gad_fast.models.attention import NAME as ROWS
from gad_fast.models.attention import note_window

NAME = "gad_fast_decode"


def takes_boolean_masks(model: PreTrainedModel) -> bool:
    """Whether a model's attention is scaled_dot_product_attention, the only one replaced here."""
    return _implementation(model) in ("sdpa", ROWS)


@contextlib.contextmanager
def decode_attention(model: PreTrainedModel) -> Generator[None]:
    """Within it, a model with scaled_dot_product_attention attends by groups of heads."""
    config: Any = model.config.get_text_config()
    own = _implementation(model)
    if own in ("sdpa", ROWS):
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` gives, with its arguments.

    Shapes: query [N, heads, 1, width], key and value [N, key heads, columns, width], mask Bool
    [N, 1, 1, columns], true up to the row's own token. With an option that counts, `scaling` and
    `sliding_window` apart, transformers' own runs.
    """
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = _within(mask, options.get("sliding_window"))
    has_bias = options.get("position_bias") is not None
    if query.shape[2] != 1 or options.get("dropout") or has_bias:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    rows, num_heads, _, width = query.shape
    output = functional.scaled_dot_product_attention(
        query.view(rows, key.shape[1], num_heads // key.shape[1], width),
        key,
        value,
        attn_mask=mask,
        scale=options.get("scaling"),
    )
    return output.reshape(rows, 1, num_heads, value.shape[-1]), None


def _within(is_seen: Tensor, window: int | None) -> Tensor:
    """A mask without what lies before each row's last `window` tokens."""
    note_window(window)
    if window is None or window >= is_seen.shape[-1]:
        return is_seen
    columns = torch.arange(is_seen.shape[-1], device=is_seen.device)
    return is_seen & (columns >= is_seen.sum(-1, keepdim=True) - window)


def _implementation(model: PreTrainedModel) -> str | None:
    config: Any = model.config.get_text_config()
    return config._attn_implementation


AttentionInterface.register(NAME, grouped_attention)
