"""What a forward and backward pass holds at once, found by running it on tensors without data.

A trial of two sizes tells what the architecture keeps for the backward pass, whatever its layers
are, in a second and without weights: nothing has to be known of it here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel


class Shape(NamedTuple):
    """A micro-batch."""

    rows: int
    columns: int


def pass_bytes(
    config: PreTrainedConfig,
    make_model: Callable[[PreTrainedConfig], PreTrainedModel],
    run: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor],
    shape: Shape,
) -> int:
    """Most bytes that a pass holds beside weights and gradients.

    Args:
        config: of the whole model.
        make_model: gives the model of a configuration on the device `meta`.
        run: gives the hidden states of a model's inputs.
        shape: of the inputs; every token sees all in its row.
    """
    num_layers = config.get_text_config().num_hidden_layers
    one, two = (
        _trial(make_model, _with_layers(config, layers), run, shape)
        for layers in (min(1, num_layers), min(2, num_layers))
    )
    return one + (num_layers - 1) * (two - one)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Leaves a storage out of the count."""
        storage = tensor.untyped_storage()
        self._known[id(storage)] = weakref.finalize(storage, lambda: None)

    def _count(self, storage: torch.UntypedStorage) -> None:
        finalizer = self._known.get(id(storage))
        if finalizer is not None and finalizer.alive:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[id(storage)] = weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def _trial(
    make_model: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    run: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor],
    shape: Shape,
) -> int:
    live = _LiveBytes()
    model = make_model(config)
    with FakeTensorMode():
        _give_storages(model)
        for parameter in model.parameters():
            live.ignore(parameter)
            if parameter.requires_grad:
                # As after the first micro-batch: gradients are added to those that are there.
                parameter.grad = torch.zeros_like(parameter)
                live.ignore(parameter.grad)
        inputs = _inputs(shape)
        with live:
            run(model, inputs).sum().backward()
    return live.peak


def _give_storages(model: PreTrainedModel) -> None:
    """Makes tensors without a device into such as claim to be on a CPU, where autocast casts."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _inputs(shape: Shape) -> dict[str, Tensor]:
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.ones(shape.rows, 1, shape.columns, shape.columns, dtype=torch.bool)
    return {"input_ids": ids, "position_ids": ids, "attention_mask": mask}


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    shorter: Any = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = num_layers
    if "layer_types" in vars(text) and text.layer_types is not None:
        text.layer_types = text.layer_types[:num_layers]
    return shorter
