"""The sizes that follow from a recipe: steps, tokens, and an estimate of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gad_fast.config import Recipe
from gad_fast.data.prompt_set import PromptSet
from gad_fast.models.loading import Precision, causal_lm_from_config

GIB = 2**30
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""What the fused head lets a chunk of logits take (kernels.linear_policy_loss)."""


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
        memory_gib=_memory(recipe, config, num_parameters, precision),
    )


def _memory(
    recipe: Recipe, config: PreTrainedConfig, num_parameters: int, precision: Precision
) -> dict[str, float]:
    """A rough estimate; a discriminator with a backbone of its own is taken to be of like size."""
    text = config.get_text_config()
    weight_bytes = getattr(torch, recipe.student.dtype).itemsize
    compute_bytes = (precision.compute_dtype or getattr(torch, recipe.student.dtype)).itemsize
    player = num_parameters * weight_bytes * 4  # weights, gradients, two moments
    tokens = recipe.batch.tokens_per_micro_batch
    width, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
    # Kept for the backward pass: about ten vectors of the width and four of the MLP a layer.
    activations = tokens * text.num_hidden_layers * (10 * width + 4 * inner) * compute_bytes
    # A chunk of logits with its gradient at a time, and the head's gradient before it is handed on.
    chunk = tokens * _response_share(recipe) * text.vocab_size * compute_bytes
    logits = min(chunk, LOGITS_BYTES[precision.device.type]) + text.vocab_size * width * 4
    parts = {
        "student": player,
        "discriminator": player if recipe.method == "gad" else 0,
        "reference": num_parameters * weight_bytes if _has_reference(recipe) else 0,
        "activations and logits": activations + logits,
    }
    return {name: size / GIB for name, size in parts.items() if size}


def _response_share(recipe: Recipe) -> float:
    data = recipe.data
    return data.max_response_tokens / (data.max_prompt_tokens + data.max_response_tokens)


def _has_reference(recipe: Recipe) -> bool:
    return recipe.method == "gad" and recipe.game.kl_coef > 0 and recipe.game.steps != 0
