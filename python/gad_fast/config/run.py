"""What a run writes, and what it runs on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gad_fast.config.base import Settings


class RunSettings(Settings):
    """What is written, and how often."""

    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """So many of the newest checkpoints are kept."""
    samples_per_step: int = Field(default=1, ge=0)
    """Groups a step written to samples.jsonl as text."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines on the screen; metrics.jsonl has every step."""


class HardwareSettings(Settings):
    """Where and in which precision the models run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "weights"] = "auto"
    """Precision of the matrix products; `auto` is bfloat16 where the device has fast bfloat16,
    `weights` that of the stored weights. Heads and losses are always float32 at least."""
    gradient_checkpointing: bool = False
    """Keep only what goes into each layer for the backward pass, which computes the rest again: far
    less memory, a third more work, the same gradients."""
