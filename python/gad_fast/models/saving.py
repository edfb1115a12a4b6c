"""Weights out of a model while it goes on training, and back into it, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from gad_fast.errors import ModelError


def copy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; tensors that share memory share it in the copy as well."""
    copies: dict[Any, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        result[name] = copies[place]
    return result


def copy_for_saving(model: PreTrainedModel) -> Callable[[Path], None]:
    """Copies a model's weights now; the result writes them as a Hugging Face folder later."""
    weights = copy_tensors(model.state_dict())
    # Generation swaps the live model's settings for its own while a thread may be writing.
    twin: Any = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    return lambda folder: twin.save_pretrained(folder, state_dict=dict(weights))


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Reads the weights of a folder that `copy_for_saving` has written into a model in place.

    Raises:
        ModelError: the folder holds another model's weights.
    """
    own = model.state_dict()
    saved = _read(folder)
    if _missing(own, saved):
        # transformers writes some architectures under the names that they were published with.
        saved = (
            type(model)
            .from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
            .state_dict()
        )
    if saved.keys() - own.keys() or _missing(own, saved):
        raise ModelError(f"{folder} does not hold the weights of a {type(model).__name__}")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def _read(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _missing(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is not saved under its name or that of one that it is tied to."""
    there = {own[name].data_ptr() for name in saved if name in own}
    return any(tensor.data_ptr() not in there for tensor in own.values())
