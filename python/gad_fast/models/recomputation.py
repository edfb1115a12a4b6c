"""Gradient checkpointing: layers whose insides are computed again in the backward pass.

transformers' own switch also turns on what belongs to training mode, and turns off the cache of
rollouts. So it is thrown for one forward pass, on the layers alone: dropout stays off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gad_fast.errors import ConfigError

# Dropout is off, so there is no state of random numbers to bring back.
_RECOMPUTE = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def recomputed_layers(model: nn.Module) -> Generator[None]:
    """Context of a forward pass that keeps only what goes into each layer.

    Raises:
        ConfigError: the model's layers cannot be computed again.
    """
    layers = layers_of(model)
    for layer in layers:
        # An attribute of transformers that is no part of its declared interface.
        setattr(layer, "_gradient_checkpointing_func", _RECOMPUTE)  # noqa: B010
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be computed again.

    Raises:
        ConfigError: there are none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"hardware.gradient_checkpointing is not possible with {type(model).__name__}, whose "
            f"layers are none of transformers' (set it to false)"
        )
    return layers
