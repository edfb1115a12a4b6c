"""Whether a model's cache can be kept in rows: shown on the model itself, not by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.models.shared_prompts import sliding_window
from gad_fast.records import Ids
from gad_fast.rollout.engine import GenRequest, Sampling
from gad_fast.rollout.requests import in_a_line
from gad_fast.rollout.static.cache import RowCache
from gad_fast.rollout.static.decoder import Decoder, prefill_cache
from gad_fast.rollout.static.scheduler import Entry, Rollout

# How far, relative to the largest, logits made in two ways may be apart.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_COARSE = 5e-2
_LENGTHS = (4, 2)
"""Tokens of the sequences: one has a prompt to compute, the other starts with nothing."""


def require_rows(model: PreTrainedModel, device: torch.device, *, max_tokens: int | None) -> None:
    """Decodes two short sequences of different lengths and compares them with whole passes.

    Args:
        model: the student.
        device: where it is.
        max_tokens: most tokens of a sequence, None where it is not known.

    Raises:
        EngineError: a layer sees less than the whole sequence, keeps another state, or the logits
            are others.
    """
    window = sliding_window(model.config)
    if window is not None and (max_tokens is None or window < max_tokens):
        raise EngineError(
            f"its layers see a window of {window} tokens, and sequences have up to "
            f"{'any number' if max_tokens is None else max_tokens}"
        )
    try:
        gap = _largest_gap(model, device)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as e:
        raise EngineError(f"its cache is not one of keys and values ({in_a_line(e)})") from e
    tolerance = _TOLERANCE.get(model.dtype, _COARSE)
    if torch.is_autocast_enabled(device.type):
        tolerance = _COARSE
    if not gap <= tolerance:
        raise EngineError(f"its logits change by {gap:.1e} of the largest (over {tolerance:.0e})")


def cache_like(model: PreTrainedModel, device: torch.device) -> DynamicCache:
    """A cache of one token, which shows what each layer keeps."""
    return prefill_cache(model, [np.zeros(1, dtype=np.int32)], device)


def _largest_gap(model: PreTrainedModel, device: torch.device) -> float:
    prompts = _prompts(model)
    sampling = Sampling(0.0, 2)
    entries = [
        Entry(row, Rollout(GenRequest(row, ids[:-1], 1, sampling, 0), 0, None), None)
        for row, ids in enumerate(prompts)
    ]
    cache = RowCache(cache_like(model, device), num_rows=2, num_columns=max(_LENGTHS))
    decoder = Decoder(model, cache, device)
    decoder.enter(entries)
    last = np.array([len(ids) - 1 for ids in prompts])
    for back in (1, 0):
        inputs = np.array([ids[-1 - back] for ids in prompts], dtype=np.int64)
        logits = decoder.step(inputs, last - back)
    whole = torch.stack([_logits(model, ids, device) for ids in prompts])
    if not whole.isfinite().all():
        return 0.0  # broken weights are no matter of the cache: sampling tells
    return float((logits - whole).abs().max() / whole.abs().max())


def _prompts(model: PreTrainedModel) -> list[Ids]:
    embeddings: Any = model.get_input_embeddings()
    random = np.random.default_rng(0)
    size = embeddings.num_embeddings
    return [random.integers(size, size=length).astype(np.int32) for length in _LENGTHS]


def _logits(model: Any, ids: Ids, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        row = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        return model(input_ids=row, use_cache=False).logits[0, -1]
