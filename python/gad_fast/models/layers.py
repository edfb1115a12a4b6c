"""Layers that run in another way for one forward pass: computed again later, compiled, or both.

transformers' own switch for recomputation also turns on what belongs to training mode, and turns
off the cache of rollouts. So it is thrown for one forward pass, on the layers alone: dropout stays
off. Compiled layers go through the same switch, so that rollouts and scores run as ever.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError

# Dropout is off, so there is no state of random numbers to bring back.
_recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def altered_layers(model: nn.Module, *, is_recomputed: bool, is_compiled: bool) -> Generator[None]:
    """Context of a forward pass.

    Args:
        model: whose layers are to run in another way.
        is_recomputed: the pass keeps only what goes into each layer.
        is_compiled: layers are compiled by `torch.compile`, once for all that are alike.
    """
    layers = layers_of(model)
    for layer in layers:
        run = functools.partial(_run_compiled, layer) if is_compiled else _run_as_it_is
        run_layer = functools.partial(_recompute, run) if is_recomputed else run
        # An attribute of transformers that is no part of its declared interface.
        setattr(layer, "_gradient_checkpointing_func", run_layer)  # noqa: B010
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


@contextlib.contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """Context in which each of these modules runs another function for its forward pass."""
    for module, forward in forwards.items():
        # An attribute of the object hides the method of its class.
        setattr(module, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        for module in forwards:
            delattr(module, "forward")


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can run in another way.

    Raises:
        ConfigError: there are none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"hardware.gradient_checkpointing and compile_layers are not possible with "
            f"{type(model).__name__}, whose layers are none of transformers' (set them to false)"
        )
    return layers


def require_compiler(settings: HardwareSettings, device: torch.device) -> None:
    """Raises ConfigError when layers are to be compiled and nothing is there to do it."""
    if not settings.compile_layers:
        return
    if device.type == "cuda":
        needed, is_there = "triton", importlib.util.find_spec("triton") is not None
    else:
        needed = os.environ.get("CXX", "g++")
        is_there = shutil.which(needed) is not None
    if not is_there:
        raise ConfigError(
            f"hardware.compile_layers needs {needed} on {device.type}, which is not there "
            f"(install it, or set hardware.compile_layers = false)"
        )


def _run_as_it_is(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


def _run_compiled(
    layer: GradientCheckpointingLayer, call: functools.partial[Any], *args: Any
) -> Any:
    # The layer's own call comes with its keywords bound, anew each time: it cannot be compiled.
    return _compiled()(layer, *args, **call.keywords)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """`_forward`, compiled for layers that are alike; made late, since it takes a second."""
    return torch.compile(_forward, dynamic=True)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer.forward(*args, **kwargs)
