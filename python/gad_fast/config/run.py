"""What a run writes, and what it runs on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gad_fast.config.base import Settings


class RunSettings(Settings):
    """What is written, and how often."""

    checkpoint_every_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    checkpoint_every_minutes: float | None = Field(default=None, gt=0)
    """A checkpoint is also written at the first step that ends so long after the last one."""
    keep_last: int = Field(default=2, ge=1)
    """So many of the newest checkpoints are kept."""
    keep_best: int = Field(default=0, ge=0)
    """So many of the best checkpoints are kept besides; needs `validate_every`."""
    best_by: Literal["teacher_nll", "rouge_l"] = "teacher_nll"
    """The validation figure that makes a checkpoint the best: lowest NLL or highest ROUGE-L."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations within a stage; 0 validates at the start and after each stage."""
    grace_seconds: float = Field(default=25.0, gt=0)
    """After SIGTERM a step may take so long to come to a point where a checkpoint can be written;
    then the process leaves with the checkpoint before."""
    samples_per_step: int = Field(default=1, ge=0)
    """Groups a step written to samples.jsonl as text."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines on the screen; metrics.jsonl has every step."""

    @model_validator(mode="after")
    def _can_tell_the_best(self) -> Self:
        if self.keep_best and not self.validate_every:
            raise ValueError(
                f"keep_best = {self.keep_best} needs validations to compare "
                f"(set run.validate_every = {self.checkpoint_every_steps}, say)"
            )
        return self


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
    compile_layers: bool = False
    """Run each layer compiled by `torch.compile`, in training passes and in the static engine's
    decode steps: minutes at the start, equal results up to roundings. Needs a C++ compiler on a
    CPU."""
