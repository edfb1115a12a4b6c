"""How much memory a run will take, from its recipe and the configurations of its models.

What stays is counted: weights, adapters, moments. What a training pass holds is found by a trial
without data (models.live_bytes), so that it is right for whatever layers a model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gad_fast.config import Recipe
from gad_fast.models.live_bytes import Shape, pass_bytes
from gad_fast.models.loading import (
    Precision,
    causal_lm_from_config,
    load_config,
    scorer_from_config,
)
from gad_fast.models.lora import AdapterSet

GIB = 2**30
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""What the fused head lets a chunk of logits take (kernels.linear_policy_loss)."""
BYTES_OF_MOMENTS = {"adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw_8bit": 2 * (1 + 4 / 256)}
"""A weight's two moments in a byte each, with a float32 scale for each block of 256."""

_NOT_POSSIBLE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)

Run = Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class _Player:
    """Bytes of one player."""

    weights: float
    """All that it reads through."""
    learned: float
    """Its trained weights, or those of its adapter; its gradients take as much."""
    moments: float
    held_in_pass: float
    """By a training pass, beside weights and gradients; NaN where a trial is not possible."""


def memory_gib(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> dict[str, float]:
    """GiB by what they hold, when a step needs most.

    Not included: Python and its libraries, and the host's copy of weights and moments while a
    checkpoint is being written.

    Args:
        recipe: of the run.
        config: the student's.
        precision: of the passes.

    Returns:
        Sizes by what they are of; NaN for activations that a trial without data does not tell.

    Raises:
        ConfigError: there is nothing that the adapters or recomputed layers could stand on.
        ModelError: the discriminator's configuration cannot be loaded.
    """
    student = _student(recipe, config, precision)
    players, stays = {"student": student}, {"student": student.weights + student.moments}
    if recipe.method == "gad":
        discriminator = _discriminator(recipe, config, precision)
        is_shared = recipe.lora.rank > 0 and recipe.discriminator.model == "student"
        own_weights = discriminator.learned if is_shared else discriminator.weights
        players["discriminator"] = discriminator
        stays["discriminator"] = own_weights + discriminator.moments
        if recipe.game.kl_coef > 0 and recipe.game.steps != 0:
            stays["reference"] = student.learned
    moments = [{"rollouts": _rollout_bytes(recipe, config, precision)}]
    for name, player in players.items():
        gradients = {f"the {name}'s gradients": player.learned}
        moments.append({**gradients, "activations and logits": player.held_in_pass})
    parts = stays | max(moments, key=_size)
    return {part: size / GIB for part, size in parts.items()}


def _size(held: dict[str, float]) -> float:
    """The sum; what is not known may be the largest."""
    size = sum(held.values())
    return math.inf if math.isnan(size) else size


def _student(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> _Player:
    def make(config: PreTrainedConfig) -> PreTrainedModel:
        model = causal_lm_from_config(config, recipe.student.dtype)
        return _with_adapter(model, recipe, "student")

    num_responses = recipe.rollout.group_size if recipe.method == "gad" else 1
    shape = _shape(recipe, num_responses)
    head = _head_bytes(recipe, config, precision, shape.rows * num_responses)
    return _player(recipe, config, precision, make, shape, head)


def _discriminator(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> _Player:
    settings = recipe.discriminator
    if settings.model != "student":
        config = load_config(settings.model)

    def make(config: PreTrainedConfig) -> PreTrainedModel:
        scorer: Any = _with_adapter(
            scorer_from_config(config, settings.dtype), recipe, "discriminator"
        )
        scorer.score.requires_grad_(True)
        return scorer

    return _player(recipe, config, precision, make, _shape(recipe, recipe.rollout.group_size + 1))


def _player(
    recipe: Recipe,
    config: PreTrainedConfig,
    precision: Precision,
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    shape: Shape,
    head: float = 0.0,
) -> _Player:
    model = make(config)
    learned = [p for p in model.parameters() if p.requires_grad]
    of_moments = BYTES_OF_MOMENTS.get(recipe.optimizer.name)
    return _Player(
        weights=_bytes(model.parameters()),
        learned=_bytes(learned),
        moments=(
            2 * _bytes(learned)
            if of_moments is None
            else of_moments * sum(p.numel() for p in learned)
        ),
        held_in_pass=head + _trial(config, make, precision, shape),
    )


def _trial(
    config: PreTrainedConfig,
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    precision: Precision,
    shape: Shape,
) -> float:
    for is_masked in (True, False):
        try:
            return pass_bytes(config, make, _backbone(precision, is_masked=is_masked), shape)
        except _NOT_POSSIBLE:
            continue  # layers with a state take no such mask, and some no tensors without data
    return math.nan


def _with_adapter(model: PreTrainedModel, recipe: Recipe, name: str) -> PreTrainedModel:
    if recipe.lora.rank > 0:
        AdapterSet(model, recipe.lora, name).add(name)
    return model


def _backbone(
    precision: Precision, *, is_masked: bool
) -> Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]:
    # The trial is on a CPU: what a GPU keeps for the backward pass is taken to be the same.
    trial = precision.on_cpu()

    def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        if not is_masked:
            del inputs["attention_mask"]
        with trial.forward_pass(model):
            output: Any = model.base_model(**inputs, use_cache=False)
        return output.last_hidden_state

    return run


def _shape(recipe: Recipe, num_responses: int) -> Shape:
    """The largest micro-batch, of groups as long as they may be."""
    data, batch = recipe.data, recipe.batch
    columns = data.max_prompt_tokens + num_responses * data.max_response_tokens
    rows = batch.tokens_per_micro_batch // columns
    return Shape(min(max(rows, 1), batch.prompts_per_step), columns)


def _head_bytes(
    recipe: Recipe, config: PreTrainedConfig, precision: Precision, num_responses: int
) -> float:
    """What the student's head adds: a chunk of logits, and gradients made with the loss."""
    text = config.get_text_config()
    num_tokens = num_responses * recipe.data.max_response_tokens
    itemsize = max(4, getattr(torch, recipe.student.dtype).itemsize)
    logits = min(num_tokens * text.vocab_size * itemsize, LOGITS_BYTES[precision.device.type])
    weight_gradient = text.vocab_size * text.hidden_size if recipe.lora.rank == 0 else 0
    return logits + itemsize * (weight_gradient + 2 * num_tokens * text.hidden_size)


def _rollout_bytes(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> float:
    """Keys and values of the rollouts that are sampled at once, and their logits."""
    text = config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = (precision.compute_dtype or getattr(torch, recipe.student.dtype)).itemsize
    a_token = 2 * text.num_hidden_layers * num_heads * width * itemsize
    group_size = recipe.rollout.group_size if recipe.method == "gad" else 1
    num_rollouts = min(recipe.rollout.max_sequences, recipe.batch.prompts_per_step * group_size)
    return num_rollouts * (recipe.data.max_tokens * a_token + 3 * 4 * text.vocab_size)


def _bytes(parameters: Any) -> float:
    return math.fsum(p.numel() * p.itemsize for p in parameters)
