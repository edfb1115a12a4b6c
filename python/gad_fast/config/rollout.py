"""How the student samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gad_fast.config.base import Settings


class RolloutSettings(Settings):
    """How the student samples."""

    engine: Literal["reference"] = "reference"
    """`reference` is transformers' `generate` on the student's live weights."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts a prompt."""
    temperature: float = Field(default=0.8, gt=0)
    """Sampling temperature; the policy loss sees log-probabilities at this temperature."""
    max_sequences: int = Field(default=256, ge=1)
    """At most so many rollouts are generated at once."""
