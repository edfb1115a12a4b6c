"""Decode steps with compiled layers: what stands between products becomes few kernels.

A layer gets its own part of the cache in the place of the whole: its number in the whole would be
compiled into the code, and every layer for itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gad_fast.models.layers import forwards_replaced, layers_of
from gad_fast.rollout.static.cache import RowCache, RowLayer


def compiled_layers(
    model: PreTrainedModel, cache: RowCache
) -> contextlib.AbstractContextManager[None]:
    """Within it, passes of one token a row over this cache run through `torch.compile`.

    Raises:
        ConfigError: the model's layers are none of transformers'.
    """
    pairs = zip(layers_of(model), cache.parts, strict=True)
    return forwards_replaced(
        {layer: functools.partial(_run, layer, cache, part) for layer, part in pairs}
    )


def _run(layer: nn.Module, cache: RowCache, part: RowLayer, *args: Any, **kwargs: Any) -> Any:
    is_ours = any(value is cache for value in (*args, *kwargs.values()))
    if part.place.columns is None or not is_ours:
        return _forward(layer, *args, **kwargs)
    own = [part if value is cache else value for value in args]
    named = {name: part if value is cache else value for name, value in kwargs.items()}
    return _compiled()(layer, *own, **named)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """`_forward`, compiled for layers that are alike; made late, since it takes a second."""
    return torch.compile(_forward, dynamic=True)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
