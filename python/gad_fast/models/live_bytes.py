"""What a forward and backward pass holds at once, found by running it on tensors without data.

A trial of two sizes tells what the architecture keeps for the backward pass, whatever its layers
are, in a second and without weights: nothing has to be known of it here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from gad_fast.models.batch import Batch

Run = Callable[[PreTrainedModel, Batch], Tensor]
"""Gives a model's hidden states of a batch."""


class Held(NamedTuple):
    """Bytes beside weights and gradients."""

    after_forward: int
    """What is kept for the backward pass."""
    at_peak: int


def pass_bytes(
    config: PreTrainedConfig,
    make_model: Callable[[PreTrainedConfig], PreTrainedModel],
    run: Run,
    batch: Batch,
) -> Held:
    """What a pass holds beside weights and gradients.

    Args:
        config: of the whole model.
        make_model: gives the model of a configuration on the device `meta`.
        run: what is tried.
        batch: a micro-batch as it is laid out for training; its numbers do not matter.
    """
    num_layers = config.get_text_config().num_hidden_layers
    one, two = (
        _trial(make_model, _with_layers(config, layers), run, batch)
        for layers in (min(1, num_layers), min(2, num_layers))
    )
    after_forward, in_layers, _ = (
        of_one + (num_layers - 1) * (of_two - of_one)
        for of_one, of_two in zip(one, two, strict=True)
    )
    return Held(after_forward, max(in_layers, one.at_peak))


class _Found(NamedTuple):
    """Bytes that a trial of few layers has found."""

    after_forward: int
    in_layers: int
    """At the peak before the gradient of the embeddings, which comes when nothing else is left."""
    at_peak: int


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
    run: Run,
    batch: Batch,
) -> _Found:
    live = _LiveBytes()
    model = make_model(config)
    with FakeTensorMode() as mode:
        _give_storages(model)
        for parameter in model.parameters():
            live.ignore(parameter)
            if parameter.requires_grad:
                # As after the first micro-batch: gradients are added to those that are there.
                parameter.grad = torch.zeros_like(parameter)
                live.ignore(parameter.grad)
        inputs = _inputs(batch, mode)
        peaks = _peaks_before_embeddings(model, live)
        with live:
            loss = run(model, inputs).sum()
            after_forward = live.now
            loss.backward()
    return _Found(after_forward, peaks[0] if peaks else live.peak, live.peak)


def _peaks_before_embeddings(model: PreTrainedModel, live: _LiveBytes) -> list[int]:
    """A list that gets the peak so far when a backward pass arrives at the embeddings."""
    peaks: list[int] = []

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: peaks.append(live.peak))

    embeddings: Any = model.get_input_embeddings()
    embeddings.register_forward_hook(watch)
    return peaks


def _give_storages(model: PreTrainedModel) -> None:
    """Makes tensors without a device into such as claim to be on a CPU, where autocast casts."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _inputs(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch with tensors without data."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    fakes = {k: mode.from_tensor(v) for k, v in tensors.items() if isinstance(v, Tensor)}
    return replace(batch, **fakes)


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    shorter: Any = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = num_layers
    if "layer_types" in vars(text) and text.layer_types is not None:
        text.layer_types = text.layer_types[:num_layers]
    return shorter
