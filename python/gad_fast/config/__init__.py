"""The recipe: everything that decides a run, as frozen typed records read from TOML.

A recipe is validated once, when it is made; every later stage trusts it. This package imports no
torch, so that `gad-fast --help` is quick and a recipe can be checked on any machine.
"""

from gad_fast.config.data import DataSettings
from gad_fast.config.health import HealthSettings, Watch
from gad_fast.config.learning import (
    BatchSettings,
    GameSettings,
    LearningRateSettings,
    OptimizerSettings,
    StageSettings,
    WarmupSettings,
)
from gad_fast.config.lora import LoraSettings
from gad_fast.config.players import DiscriminatorSettings, StudentSettings
from gad_fast.config.recipe import Recipe
from gad_fast.config.rollout import RolloutSettings
from gad_fast.config.run import HardwareSettings, RunSettings

__all__ = [
    "BatchSettings",
    "DataSettings",
    "DiscriminatorSettings",
    "GameSettings",
    "HardwareSettings",
    "HealthSettings",
    "LearningRateSettings",
    "LoraSettings",
    "OptimizerSettings",
    "Recipe",
    "RolloutSettings",
    "RunSettings",
    "StageSettings",
    "StudentSettings",
    "WarmupSettings",
    "Watch",
]
