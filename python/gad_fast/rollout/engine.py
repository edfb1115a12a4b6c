"""The protocol of a rollout engine: token ids in, token ids out, as they finish."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from gad_fast.errors import ConfigError
from gad_fast.records import Ids, Logprobs, Response


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can do, as data."""

    logprobs: bool
    """Outputs carry the log-probability of each token."""
    in_place: bool
    """Shares the trainer's weights: an update needs no transfer."""
    may_hang: bool = True
    """Waits for a device, a thread or a server; given up when no rollout comes for too long."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much an engine may hold at once."""

    max_sequences: int
    """Rollouts."""
    max_cached_tokens: int | None = None
    """Tokens of all rollouts together, prompts included; None leaves it to `max_sequences`."""
    longest_sequence: int | None = None
    """Most tokens that any prompt and response will have together, None where it is not known."""

    def rows(self, num_columns: int) -> int:
        """Rollouts of so many tokens that are sampled at once, at least 1."""
        if self.max_cached_tokens is None:
            return self.max_sequences
        return max(1, min(self.max_sequences, self.max_cached_tokens // num_columns))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Top-k, top-p and stop strings are for generation alone: the policy loss differentiates the whole
    distribution, and a response that a string ended has no end token for the discriminator to read.
    """

    temperature: float
    """0 takes the most likely token."""
    max_tokens: int
    """Most tokens of a response, the end token included."""
    top_k: int = 0
    """Draw from the so many most likely tokens; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that have this probability together."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; the token that completes one is its last."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature must be 0 or more, got {self.temperature} (0 takes the likeliest "
                f"token, 1 draws from the model's own distribution)"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.top_k < 0:
            raise ConfigError(
                f"top_k must be 0 or more, got {self.top_k} (0 draws from all tokens)"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be over 0 and at most 1, got {self.top_p} (1 cuts none)")
        if "" in self.stop:
            raise ConfigError("a stop string must not be empty")

    @property
    def is_trainable(self) -> bool:
        """Whether a policy loss on the responses is unbiased."""
        return self.top_k == 0 and self.top_p == 1 and not self.stop


@dataclass(frozen=True, slots=True)
class GenRequest:
    """One prompt to be answered `n` times."""

    group_id: int
    """The caller's number for the group; it comes back with each output."""
    prompt_ids: Ids
    n: int
    sampling: Sampling
    seed: int


class FinishReason(StrEnum):
    """Why a response has no more tokens."""

    END = "end"
    """The end token was sampled."""
    STOP = "stop"
    """A stop string was completed."""
    LENGTH = "length"
    """It was cut at `max_tokens`."""


@dataclass(frozen=True, slots=True)
class GenOutput:
    """One rollout."""

    group_id: int
    rollout_index: int
    """Its number among the `n` of its request, from 0."""
    response: Response
    logprobs: Logprobs | None
    """Float32 [R] of the distribution that each token was drawn from; at temperature 0 that of the
    model itself. None from an engine without `caps.logprobs`."""
    finish_reason: FinishReason
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
        """Rollouts in the order in which they finish; all requests share their sampling.

        Until the last one is out, the caller neither updates nor differentiates the student.

        Raises:
            EngineError: a request does not fit, or sampling failed.
        """
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
