"""Whether a model gives the same numbers when it reads a group's prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gad_fast.models.attention import use_row_attention, windows_noted
from gad_fast.models.batch import Batch, Item, pad, share_prompts
from gad_fast.records import Response

# How far, relative to the largest, hidden states made in two ways may be apart.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def can_share_prompts(model: PreTrainedModel, *, max_tokens: int | None) -> bool:
    """Proves it on small groups: layers that keep a state, or attend in their own way, fail it.

    A model whose attention can be replaced by one over rows has it from now on.

    Args:
        model: a language model or a scorer.
        max_tokens: most tokens of a prompt with one response, None where it is not known. Windows
            below it are too long for the proof; that each layer asks for its own has to do.
    """
    parameter = next(model.parameters())
    if parameter.dtype not in _TOLERANCE or not use_row_attention(model):
        return False
    items, device = _sample(model), parameter.device
    try:
        with torch.no_grad(), windows_noted() as windows:
            shared = _last_tokens(model, share_prompts(items, device=device))
            padded = _last_tokens(model, pad(items, pad_id=0, device=device))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # such rows are not taken at all
    limit = _TOLERANCE[parameter.dtype] * padded.abs().max()
    is_same = bool((shared - padded).abs().max() <= limit)
    return is_same and keeps_windows(model.config, windows, max_tokens=max_tokens)


def keeps_windows(
    config: PreTrainedConfig, asked: Sequence[int | None], *, max_tokens: int | None
) -> bool:
    """Whether no layer sees less than it gets, or those that do ask for their window.

    Args:
        config: of a model.
        asked: what `windows_noted` had from one pass through all layers, or from several.
        max_tokens: most tokens of a sequence, None where it is not known.
    """
    window = sliding_window(config)
    if window is None or (max_tokens is not None and max_tokens <= window):
        return True
    text: Any = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    num_narrow = len(types) - types.count("full_attention")
    return bool(asked) and asked.count(window) * len(types) == num_narrow * len(asked)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many tokens the narrowest layers see, None where all see the whole sequence."""
    text: Any = config.get_text_config()
    sliding = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        sliding = None
    limits = (sliding, getattr(text, "attention_chunk_size", None))
    return min((limit for limit in limits if limit is not None), default=None)


def _sample(model: PreTrainedModel) -> list[Item]:
    embeddings: Any = model.get_input_embeddings()
    random = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return random.integers(embeddings.num_embeddings, size=length).astype(np.int32)

    return [
        Item(ids(3), [Response(ids(length), is_finished=True) for length in (3, 1, 2)]),
        Item(ids(1), [Response(ids(4), is_finished=True)]),
    ]


def _last_tokens(model: PreTrainedModel, batch: Batch) -> Tensor:
    output: Any = model.base_model(**batch.model_inputs, use_cache=False)
    return batch.last_tokens(output.last_hidden_state)
