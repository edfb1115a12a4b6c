"""One player's optimizer: AdamW, its learning-rate schedule, and the gate before an update."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gad_fast.config import LearningRateSettings, OptimizerSettings
from gad_fast.errors import ConfigError, NonFiniteError

Schedule = Callable[[int], float]


class PlayerOptimizer:
    """Updates one player; its moments live on from stage to stage, its schedule starts anew."""

    def __init__(
        self, player: str, parameters: Iterable[nn.Parameter], settings: OptimizerSettings
    ) -> None:
        self.player = player
        self.learning_rate = 0.0
        self.is_paused = False
        """Updates are left out, and the weights stay as they are."""
        self._max_grad_norm = settings.max_grad_norm
        self._parameters = [p for p in parameters if p.requires_grad]
        self._settings = settings
        self._adamw = self._fresh()
        self._schedule: Schedule = lambda _: 0.0
        self._num_updates = 0

    def begin_stage(
        self, settings: LearningRateSettings, num_updates: int, num_done: int = 0
    ) -> None:
        """Starts the schedule of a stage of `num_updates` updates, of which `num_done` are done."""
        self._schedule = schedule(settings, num_updates)
        self._num_updates = num_done

    def forget(self) -> None:
        """Drops the moments, as the official code does between warm-up and game."""
        self._adamw = self._fresh()

    @property
    def num_updates(self) -> int:
        """Updates of the stage so far, which is where its schedule stands."""
        return self._num_updates

    def state_dict(self) -> dict[str, Any]:
        """The moments: tensors and numbers by name, for each parameter."""
        state = self._adamw.state_dict()
        entries = {index: _flat(entry) for index, entry in state["state"].items()}
        return {**state, "state": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the moments that `state_dict` gave."""
        self._adamw.load_state_dict(state)

    def update(self, loss: float) -> float:
        """Clips the gradients, updates the weights, and clears the gradients.

        Args:
            loss: value whose gradients have been accumulated.

        Returns:
            The gradients' norm before clipping.

        Raises:
            NonFiniteError: the loss or the norm is not finite; the weights are as before.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the {self.player}'s loss is {loss} with gradient norm {norm}: stopped before the "
                f"update (lower its learning rate or hardware.compute_dtype = 'float32')"
            )
        if self.is_paused:
            self.learning_rate = 0.0
            self._adamw.zero_grad()
            return norm
        self.learning_rate = self._schedule(self._num_updates)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self._adamw.zero_grad()
        self._num_updates += 1
        return norm

    def _fresh(self) -> torch.optim.Optimizer:
        return _adamw(self._parameters, self._settings)


def require_optimizer(settings: OptimizerSettings, device: torch.device) -> None:
    """Raises ConfigError when the optimizer is not installed, or not made for the device."""
    if settings.name != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.name = {settings.name!r} needs bitsandbytes, which is not installed "
            f"(pip install 'gad-fast[lowbit]', or set optimizer.name = 'adamw')"
        )
    if settings.name == "paged_adamw_8bit" and device.type != "cuda":
        raise ConfigError(
            f"optimizer.name = 'paged_adamw_8bit' moves pages between a GPU and its host, and this "
            f"run is on {device.type} (set optimizer.name = 'adamw_8bit')"
        )


def _adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
    }
    match settings.name:
        case "adamw":
            # One pass over weights, gradients and moments, without temporary copies of them.
            return torch.optim.AdamW(parameters, fused=True, **options)
        case "adamw_8bit":
            return _bitsandbytes().AdamW8bit(parameters, **options)
        case "paged_adamw_8bit":
            return _bitsandbytes().PagedAdamW8bit(parameters, **options)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without the dictionary that bitsandbytes hides its tensors in; it loads without."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        flat |= value if isinstance(value, dict) else {name: value}
    # All parameters share the tables of what a byte stands for, and safetensors refuses to.
    tables = {name: value.clone() for name, value in flat.items() if name.startswith("qmap")}
    return flat | tables


def _bitsandbytes() -> Any:
    # Imported late: it is optional, and has no types.
    return importlib.import_module("bitsandbytes.optim")


def schedule(settings: LearningRateSettings, num_updates: int) -> Schedule:
    """Learning rate of each update of a stage, counted from 0.

    The last update runs at `final_fraction * peak` unless the schedule is constant.
    """

    def rate(update: int) -> float:
        if update < settings.ramp_steps:
            return settings.peak * (update + 1) / (settings.ramp_steps + 1)
        span = max(1, num_updates - 1 - settings.ramp_steps)
        progress = min(1.0, (update - settings.ramp_steps) / span)
        match settings.schedule:
            case "constant":
                remaining = 1.0
            case "linear":
                remaining = 1.0 - progress
            case "cosine":
                remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        floor = settings.final_fraction
        return settings.peak * (floor + (1.0 - floor) * remaining)

    return rate
