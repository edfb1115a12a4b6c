"""The recipe: everything that decides a run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from gad_fast.config.base import Document
from gad_fast.config.data import DataSettings
from gad_fast.config.health import HealthSettings
from gad_fast.config.learning import (
    BatchSettings,
    GameSettings,
    OptimizerSettings,
    WarmupSettings,
)
from gad_fast.config.lora import LoraSettings
from gad_fast.config.players import DiscriminatorSettings, StudentSettings
from gad_fast.config.rollout import RolloutSettings
from gad_fast.config.run import HardwareSettings, RunSettings


class Recipe(Document):
    """A complete, validated description of one run."""

    noun: ClassVar[str] = "recipe"

    name: str = Field(min_length=1)
    """Shown on the screen and in the reports."""
    output: Path
    """The run folder; an unfinished run of this recipe in it goes on where it was."""
    seed: int = Field(default=0, ge=0)
    """Decides order of data, rollouts and the discriminator's fresh head."""
    method: Literal["gad", "seqkd"] = "gad"
    """`seqkd` is the baseline: warm-up of the student alone, no rollouts, no discriminator."""
    student: StudentSettings
    data: DataSettings
    warmup: WarmupSettings
    game: GameSettings
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    lora: LoraSettings = LoraSettings()
    rollout: RolloutSettings = RolloutSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()
    hardware: HardwareSettings = HardwareSettings()
    health: HealthSettings = HealthSettings()

    @model_validator(mode="after")
    def _can_centre_rewards(self) -> Self:
        if self.method == "gad" and self.game.steps != 0 and self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size must be at least 2 to centre the rewards of a group, "
                f"got {self.rollout.group_size} (set rollout.group_size = 4, say)"
            )
        return self
