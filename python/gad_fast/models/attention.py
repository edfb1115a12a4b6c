"""Attention of prompts that are read once: every response attends in a row of its own.

In a micro-batch of `SharedPrompts` all tokens lie end to end, each prompt once. Most of a model
sees single tokens; attention alone must know which belong together. It gathers the rows `[prompt]
[response]` and attends in each as in any sequence, causally and without a mask, which is what fast
kernels are for. A mask over all tokens of a group would cost the square of them, most of it masked.
Layers with a window that is shorter than the rows are the only ones with a mask, of one row's size.

Shapes: T tokens, N responses, L tokens of the longest row, H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "gad_fast"

_windows: ContextVar[list[int | None] | None] = ContextVar("windows", default=None)


def use_row_attention(model: PreTrainedModel) -> bool:
    """Lets a model take `rows_as_mask` for a mask; False where it has an attention of its own."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME
    return config._attn_implementation == NAME


def rows_as_mask(tokens: Tensor, places: Tensor) -> Tensor:
    """Rows in the one shape that transformers hands on to attention as it is, int64 [2, 1, N, L].

    Args:
        tokens: int64 [N, L], the token at each place of the rows; any after a row's end, where
            causal attention never looks.
        places: int64 [T], a place of each token in the flattened rows.
    """
    mask = tokens.new_zeros(2, 1, *tokens.shape)
    mask[0, 0] = tokens
    mask[1].view(-1)[: len(places)] = places
    return mask


@contextlib.contextmanager
def windows_noted() -> Generator[list[int | None]]:
    """The window that each layer asks for where it attends by ours; None for all tokens."""
    windows: list[int | None] = []
    token = _windows.set(windows)
    try:
        yield windows
    finally:
        _windows.reset(token)


def note_window(window: int | None) -> None:
    """A layer asks for this one."""
    # Compiled code cannot ask, and would be cut in two here.
    noted = None if torch.compiler.is_compiling() else _windows.get()
    if noted is not None:
        noted.append(window)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward`, which also takes rows for a mask.

    Args:
        module: the attention layer.
        query: [1, H, T, width].
        key: [1, key heads, T, width].
        value: as the keys.
        attention_mask: of `rows_as_mask`, or any that the function named above takes.
        options: of that function; `sliding_window` counts for rows.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens, num_tokens = attention_mask[0, 0], query.shape[2]
    places = attention_mask[1].flatten()[:num_tokens]
    queries, keys, values = (_gather(states, tokens) for states in (query, key, value))
    mask = _window_mask(tokens.shape[1], options.get("sliding_window"), query.device)
    # [N, L, H, width]
    output, _ = sdpa_attention_forward(module, queries, keys, values, mask, **options)
    return output.flatten(0, 1).index_select(0, places)[None], None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean [1, 1, L, L], the last `window` tokens of each; None where that is all of them."""
    note_window(window)
    if window is None or window >= length:
        return None
    is_seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    return is_seen.tril().triu(1 - window)


def _gather(states: Tensor, tokens: Tensor) -> Tensor:
    """Rows [N, heads, L, width] of tokens [1, heads, T, width]."""
    # Heads of a token lie together after this: whole tokens are copied, not heads of them.
    by_token = states[0].transpose(0, 1).flatten(1)
    rows = by_token.index_select(0, tokens.flatten())
    return rows.view(*tokens.shape, states.shape[1], states.shape[3]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
