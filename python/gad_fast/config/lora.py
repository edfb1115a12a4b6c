"""Low-rank adapters instead of new weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gad_fast.config.base import Settings


class LoraSettings(Settings):
    """Both players learn adapters on weights that stay as they are.

    A discriminator of `model = "student"` shares the student's weights: student, discriminator and
    KL reference are then one model with three adapters. Choose learning rates some ten times those
    of full training.
    """

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by `alpha / rank`."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the backbone's linear layers that get an adapter, `["q_proj", "v_proj"]` for
    instance. The heads never do."""
    start_from: str | None = None
    """Folder of a peft adapter of the student to begin with; by default adapters that change
    nothing."""
