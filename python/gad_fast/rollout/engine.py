"""The protocol of a rollout engine: token ids in, token ids out, as they finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gad_fast.records import Ids, Response


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can do, as data."""

    logprobs: bool
    """Outputs carry the log-probability of each token."""
    in_place: bool
    """Shares the trainer's weights: an update needs no transfer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: from the whole distribution, without top-k and top-p.

    Cut distributions would make the policy loss's log-probabilities wrong.
    """

    temperature: float
    """0 takes the most likely token."""
    max_tokens: int
    """Most tokens of a response, the end token included."""


@dataclass(frozen=True, slots=True)
class GenRequest:
    """One prompt to be answered `n` times."""

    group_id: int
    """The caller's number for the group; it comes back with each output."""
    prompt_ids: Ids
    n: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class GenOutput:
    """One rollout."""

    group_id: int
    response: Response
    logprobs: NDArray[Any] | None
    """Float32 [R] at the sampling temperature, None from an engine without `caps.logprobs`."""
    weight_version: int
    """Version of the weights that sampled it."""


class WeightSource(Protocol):
    """The student's weights, to be read by an engine that keeps its own copy."""

    def metadata(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        """Name, dtype and shape of each tensor, without gathering any."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors by name; may be run through again."""
        ...


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """The parameters of a module on this machine."""

    module: nn.Module

    def metadata(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        """Name, dtype and shape of each parameter."""
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.module.named_parameters())


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a weight update moved."""

    weight_version: int
    num_tensors: int
    seconds: float


class RolloutEngine(Protocol):
    """Samples rollouts from some version of the student's weights."""

    @property
    def caps(self) -> EngineCaps:
        """What this engine can do."""
        ...

    def start(self) -> None:
        """Makes the engine ready; raises EngineError when it cannot be."""
        ...

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts in the order in which they finish; raises EngineError on failure."""
        ...

    def sync_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Takes over new weights; later outputs carry `version`."""
        ...

    def health(self) -> None:
        """Raises EngineError with the engine's own words when it cannot serve."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; may be called twice."""
        ...
