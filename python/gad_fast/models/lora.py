"""Low-rank adapters (peft) of one backbone, of which one takes part in a forward pass.

Student, discriminator and KL reference of a run are three adapters on one set of frozen weights.
Whoever runs a forward pass activates its adapter first; it stays active, so that a backward pass
that computes layers again (gradient checkpointing) sees the same one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    TaskType,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gad_fast.config import LoraSettings
from gad_fast.errors import ConfigError, ModelError
from gad_fast.models.saving import copy_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
_HEAD = "base_model.model.score."
"""What peft puts before the names of a classifier's head."""


class AdapterSet:
    """The adapters of a backbone, whose own weights are frozen."""

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, source: str) -> None:
        """Adds no adapter yet.

        Args:
            model: the model that the backbone belongs to; its head is frozen as well.
            settings: of every adapter.
            source: folder or Hub id of the model, which saved adapters name as their base.
        """
        model.requires_grad_(False)
        backbone: Any = model.base_model
        _require_targets(backbone, settings)
        self.backbone: nn.Module = backbone
        self.settings = settings
        self.source = source
        self.active: str | None = None
        self.trainable: dict[str, list[nn.Parameter]] = {}

    def add(self, name: str, *, is_trainable: bool = True) -> Adapter:
        """An adapter that changes nothing yet."""
        with warnings.catch_warnings():
            # That there are several is what a set is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(self.config(), self.backbone, adapter_name=name)
        adapter = Adapter(self, name)
        for parameter in adapter.parameters():
            # As peft does: an update of 1e-4 of a bfloat16 weight would be lost.
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(dtype)
        self.trainable[name] = adapter.parameters() if is_trainable else []
        self.active = None
        adapter.activate()
        return adapter

    def config(self, **options: Any) -> LoraConfig:
        """What peft needs to know of an adapter."""
        targets = self.settings.target_modules
        return LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,  # pyright: ignore[reportArgumentType]  # int by name only
            target_modules=targets if isinstance(targets, str) else list(targets),
            base_model_name_or_path=self.source,
            **options,
        )

    def activate(self, name: str) -> None:
        """Lets one adapter take part in what follows, and no other."""
        if self.active == name:
            return
        for layer in self.backbone.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(name, inference_mode=not self.trainable[name])
        # peft freezes the others, and a frozen parameter's gradient is dropped in silence.
        for parameters in self.trainable.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.active = name


class Adapter:
    """One adapter of a set."""

    def __init__(self, adapters: AdapterSet, name: str) -> None:
        self.adapters = adapters
        self.name = name

    def activate(self) -> None:
        """Lets this adapter take part in what follows, and no other."""
        self.adapters.activate(self.name)

    def parameters(self) -> list[nn.Parameter]:
        """Its weights."""
        marks = (f".lora_A.{self.name}.", f".lora_B.{self.name}.")
        named = self.adapters.backbone.named_parameters()
        return [parameter for key, parameter in named if any(mark in key for mark in marks)]

    def frozen_copy(self, name: str) -> Adapter:
        """A further adapter of the set with the weights that this one has, never to be trained."""
        # Its first weights are drawn and then replaced: no later draw may notice.
        with torch.random.fork_rng():
            copy = self.adapters.add(name, is_trainable=False)
        copy.load_state(self.state())
        return copy

    def state(self) -> dict[str, Tensor]:
        """Its weights by name, as peft names them within the backbone."""
        return get_peft_model_state_dict(self.adapters.backbone, adapter_name=self.name)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over weights; raises ModelError when they are those of another adapter or base."""
        own = self.state()
        odd = sorted(own.keys() ^ state.keys()) or [
            key for key, weight in own.items() if weight.shape != state[key].shape
        ]
        if odd:
            raise ModelError(
                f"the adapter does not fit {self.adapters.source} with rank "
                f"{self.adapters.settings.rank}: {odd[0]} and {len(odd) - 1} other weights differ "
                f"(it belongs to another base model, or was made with other [lora] settings)"
            )
        set_peft_model_state_dict(self.adapters.backbone, dict(state), adapter_name=self.name)

    def load(self, folder: Path, model: PreTrainedModel, head: nn.Linear | None = None) -> None:
        """Takes over a saved adapter, bit for bit; arguments as in `copy_for_saving`.

        Raises:
            ModelError: no adapter is there, or it belongs to another base model.
        """
        try:
            saved = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read the adapter {folder}: {error}") from error
        outer = _outer(model.base_model_prefix)
        inner = {k.removeprefix(outer): v for k, v in saved.items() if k.startswith(outer)}
        try:
            self.load_state(inner)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
        if head is not None:
            head.load_state_dict(
                {k.removeprefix(_HEAD): v for k, v in saved.items() if k.startswith(_HEAD)}
            )

    def copy_for_saving(
        self, model: PreTrainedModel, head: nn.Linear | None = None
    ) -> Callable[[Path], None]:
        """Copies the weights now; the result writes what `PeftModel` loads onto the base later.

        Args:
            model: the model that reads through the adapter.
            head: a head that is trained with it.
        """
        outer = _outer(model.base_model_prefix)
        state = {outer + key: weight for key, weight in self.state().items()}
        config = self.adapters.config(
            task_type=TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS,
            modules_to_save=None if head is None else ["score"],
        )
        config.target_modules = _resolved_targets(self.adapters.backbone)
        config.inference_mode = True
        if head is not None:
            state |= {_HEAD + key: weight for key, weight in head.state_dict().items()}
        copies = copy_tensors(state)

        def write(folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            save_file(copies, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            config.save_pretrained(str(folder))

        return write

    def merged_state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weights of a model of its own, as if the adapter had never been apart."""
        layers = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        merged: dict[str, Tensor] = {}
        for key, weight in model.state_dict().items():
            if ".lora_" in key:
                continue
            owner, is_adapted, rest = key.partition(".base_layer.")
            merged[f"{owner}.{rest}" if is_adapted else key] = (
                self._merged(layers[owner], weight) if rest == "weight" else weight
            )
        return merged

    @torch.no_grad()
    def _merged(self, layer: LoraLayer, weight: Tensor) -> Tensor:
        linear: Any = layer  # every kind of linear layer has its own class
        delta: Tensor = linear.get_delta_weight(self.name)
        dtype = torch.promote_types(weight.dtype, delta.dtype)
        # On the host: a device that held one copy of the weights may have no room for another.
        return (weight.to(dtype) + delta.to(dtype)).to("cpu", weight.dtype)


def _outer(prefix: str) -> str:
    """What peft puts before the names of a backbone's weights."""
    return f"base_model.model.{prefix}."


def _resolved_targets(backbone: nn.Module) -> list[str]:
    """Last parts of the names of all adapted layers."""
    names = (name for name, layer in backbone.named_modules() if isinstance(layer, LoraLayer))
    return sorted({name.rpartition(".")[2] for name in names})


def _require_targets(backbone: nn.Module, settings: LoraSettings) -> None:
    if settings.target_modules == "all-linear":
        return
    linear = ("Linear", "Conv1D")
    names = {
        name.rpartition(".")[2]
        for name, module in backbone.named_modules()
        if type(module).__name__ in linear
    }
    unknown = [target for target in settings.target_modules if target not in names]
    if unknown or not settings.target_modules:
        raise ConfigError(
            f"lora.target_modules {unknown} match no linear layer of the backbone, allowed: "
            f"{', '.join(sorted(names))}, or 'all-linear'"
        )
