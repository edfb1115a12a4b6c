"""The sizes that follow from a recipe: steps, tokens, and an estimate of memory."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from gad_fast.config import Recipe
from gad_fast.data.prompt_set import PromptSet
from gad_fast.game.memory import memory_gib
from gad_fast.models.loading import Precision, causal_lm_from_config


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do and need."""

    num_train: int
    num_validation: int
    num_overlong: int
    warmup_steps: int
    game_steps: int
    responses_per_step: int
    max_tokens_per_step: int
    """Response tokens of a step if none ended before the limit."""
    num_parameters: int
    memory_gib: dict[str, float]
    """GiB by what they hold, at the peak of a step."""


def make_plan(
    recipe: Recipe, prompts: PromptSet, config: PreTrainedConfig, precision: Precision
) -> Plan:
    """Derives the sizes of a run from its recipe, data and student's configuration."""
    per_step = recipe.batch.prompts_per_step
    is_game = recipe.method == "gad"
    responses = per_step * (recipe.rollout.group_size if is_game else 1)
    num_parameters = sum(p.numel() for p in causal_lm_from_config(config).parameters())
    return Plan(
        num_train=len(prompts.train),
        num_validation=len(prompts.validation),
        num_overlong=prompts.num_overlong,
        warmup_steps=recipe.warmup.num_steps(len(prompts.train), per_step),
        game_steps=recipe.game.num_steps(len(prompts.train), per_step) if is_game else 0,
        responses_per_step=responses,
        max_tokens_per_step=responses * recipe.data.max_response_tokens,
        num_parameters=num_parameters,
        memory_gib=memory_gib(recipe, config, precision),
    )
