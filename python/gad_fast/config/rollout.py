"""How the student samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gad_fast.config.base import Settings

EngineName = Literal["static", "continuous", "reference"]


class RolloutSettings(Settings):
    """How the student samples."""

    engine: EngineName = "static"
    """All three sample from the student's live weights: `static` with a preallocated cache whose
    rows are refilled, `continuous` with transformers' continuous batching, `reference` with its
    `generate`. A model that `static` cannot take goes to the next one, and the run says so."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts a prompt."""
    temperature: float = Field(default=0.8, gt=0)
    """Sampling temperature; the policy loss sees log-probabilities at this temperature."""
    max_sequences: int = Field(default=256, ge=1)
    """At most so many rollouts are generated at once."""
    max_cached_tokens: int | None = Field(default=None, ge=1)
    """At most so many tokens, prompts included, of all rollouts that are generated at once."""
    probe_every: int = Field(default=10, ge=1)
    """Every so many steps the student scores a few fresh rollouts itself; the run stops if the
    engine's log-probabilities are not its own. An engine with a copy of the weights is probed in
    every step."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """The run stops when no rollout has finished for so long. On a CPU `static` and `reference`,
    which wait for nobody, sample in the trainer's thread and are not stopped."""
