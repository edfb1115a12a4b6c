"""What an update is made of: optimizer, batch, and the stages with their rates."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gad_fast.config.base import Settings


class OptimizerSettings(Settings):
    """AdamW, the same for both players."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=0.2, gt=0)
    """Gradients are scaled down to this norm, each player's on its own."""
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in a byte each, a quarter of float32; `paged_adamw_8bit` may
    also move them to the memory of the host when the GPU's is full. Both need bitsandbytes
    (`pip install 'gad-fast[lowbit]'`)."""


class LearningRateSettings(Settings):
    """Learning rate of one player in one stage."""

    peak: float = Field(default=1e-6, ge=0)
    """Highest learning rate; 0 freezes the player."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from `peak` to `final_fraction * peak` over the stage."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """Floor of a falling schedule, as a share of `peak`."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps over which the rate first rises linearly to `peak`."""


class BatchSettings(Settings):
    """What one step works on."""

    prompts_per_step: int = Field(default=256, ge=1)
    """Prompts a step; a step samples `prompts_per_step * group_size` rollouts."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Upper bound of padded tokens a forward pass sees. It changes memory, never the loss. A prompt
    with all its rollouts and the teacher's response must fit."""


class StageSettings(Settings):
    """Length and learning rates of a stage."""

    steps: int | None = Field(default=None, ge=0)
    """Length of the stage in steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, ge=0)
    """Length of the stage in passes over the training prompts."""
    student: LearningRateSettings = LearningRateSettings()
    """Learning rate of the student."""
    discriminator: LearningRateSettings = LearningRateSettings()
    """Learning rate of the discriminator."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        return self

    def num_steps(self, num_prompts: int, prompts_per_step: int) -> int:
        """Steps of the stage over `num_prompts` training prompts; a last short batch is dropped."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return round(self.epochs * (num_prompts // prompts_per_step))


class WarmupSettings(StageSettings):
    """Stage 1: the student imitates, the discriminator learns on its live rollouts."""

    discriminator_only_steps: int = Field(default=9, ge=0)
    """The student is not updated in the first steps, while the discriminator finds its feet."""


class GameSettings(StageSettings):
    """Stage 2: the student is rewarded with the discriminator's scores."""

    advantage_scale: Literal["std", "none"] = "std"
    """`std` divides the centred rewards of a group by their standard deviation, `none` does not."""
    std_floor: float = Field(default=0.0, ge=0)
    """Least standard deviation to divide by; keeps noise small once a group is all alike."""
    kl_coef: float = Field(default=0.001, ge=0)
    """Weight of the k3 estimate of KL(student || student after warm-up); 0 keeps no reference."""
    reset_optimizer: bool = False
    """Forget both players' optimizer states of warm-up, as the official code does."""
