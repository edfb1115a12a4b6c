"""How much memory a run will take, from its recipe and the configurations of its models.

What stays is counted: weights, adapters, moments. What a training pass holds is found by a trial
without data (models.live_bytes) of the largest micro-batch, laid out as for training, so that it is
right for whatever layers a model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gad_fast.config import Recipe
from gad_fast.models.attention import use_row_attention
from gad_fast.models.batch import Batch, Item
from gad_fast.models.live_bytes import Held, pass_bytes
from gad_fast.models.loading import (
    Precision,
    causal_lm_from_config,
    load_config,
    scorer_from_config,
)
from gad_fast.models.lora import AdapterSet
from gad_fast.models.micro_batches import lay_out
from gad_fast.records import Response

GIB = 2**30
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""What the fused head lets a chunk of logits take (kernels.linear_policy_loss)."""
BYTES_OF_MOMENTS = {"adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw_8bit": 2 * (1 + 4 / 256)}
"""A weight's two moments in a byte each, with a float32 scale for each block of 256."""

_NOT_POSSIBLE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


class _MicroBatch(NamedTuple):
    """The largest of a step."""

    num_groups: int
    num_responses: int
    """Of each group."""
    is_only: bool
    """Whether it is the whole step, so that no gradients are there when its pass begins."""


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
    is_one_pass: bool
    """Whether an update has a single micro-batch."""
    merged: float
    """Weights that its adapter is merged into, to be saved at the end; 0 without adapters."""

    def in_update(self, name: str) -> dict[str, float]:
        """What an update holds at its peak, by what it is of.

        Gradients of earlier micro-batches are there all along. Those of the first come while what
        the pass holds goes, layer by layer.
        """
        gradients = self.learned
        if self.is_one_pass:
            gradients = max(0.0, gradients - self.held_in_pass)
        return {f"the {name}'s gradients": gradients, "activations and logits": self.held_in_pass}


def memory_gib(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> dict[str, float]:
    """GiB by what they hold, when a run needs most: in a step, or when its models are saved.

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
        is_shared = _shares_weights(recipe)
        own_weights = discriminator.learned if is_shared else discriminator.weights
        players["discriminator"] = discriminator
        stays["discriminator"] = own_weights + discriminator.moments
        if recipe.game.kl_coef > 0 and recipe.game.steps != 0:
            stays["reference"] = student.learned
    moments = [{"rollouts": _rollout_bytes(recipe, config, precision)}]
    moments += [player.in_update(name) for name, player in players.items()]
    if precision.device.type == "cpu":  # they are merged on the host
        moments.append({"merged weights": max(player.merged for player in players.values())})
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

    size = _micro_batch(recipe, recipe.rollout.group_size if recipe.method == "gad" else 1)
    head = _head_bytes(recipe, config, precision, size.num_groups * size.num_responses)
    return _player(recipe, config, precision, make, size, head)


def _discriminator(recipe: Recipe, config: PreTrainedConfig, precision: Precision) -> _Player:
    settings = recipe.discriminator
    dtype = recipe.student.dtype if _shares_weights(recipe) else settings.dtype
    if settings.model != "student":
        config = load_config(settings.model)

    def make(config: PreTrainedConfig) -> PreTrainedModel:
        scorer: Any = _with_adapter(scorer_from_config(config, dtype), recipe, "discriminator")
        scorer.score.requires_grad_(True)
        return scorer

    size = _micro_batch(recipe, recipe.rollout.group_size + 1)
    return _player(recipe, config, precision, make, size)


def _shares_weights(recipe: Recipe) -> bool:
    """Whether both players are adapters on the student's weights."""
    return recipe.lora.rank > 0 and recipe.discriminator.model == "student"


def _player(
    recipe: Recipe,
    config: PreTrainedConfig,
    precision: Precision,
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    size: _MicroBatch,
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
        held_in_pass=_held_in_pass(_trial(recipe, config, make, precision, size), head),
        is_one_pass=size.is_only,
        merged=_bytes(p for name, p in model.named_parameters() if ".base_layer." in name),
    )


def _trial(
    recipe: Recipe,
    config: PreTrainedConfig,
    make: Callable[[PreTrainedConfig], PreTrainedModel],
    precision: Precision,
    size: _MicroBatch,
) -> Held | None:
    for is_shared in (True, False):
        try:
            batch = _longest(recipe, size, is_shared=is_shared)
            return pass_bytes(config, make, _backbone(precision, is_shared=is_shared), batch)
        except _NOT_POSSIBLE:
            continue  # layers with a state share no prompts, and some take no tensors without data
    return None


def _held_in_pass(held: Held | None, head: float) -> float:
    """At the peak: the head's loss, which comes after the last layer, or in the backward pass."""
    return math.nan if held is None else max(held.after_forward + head, held.at_peak)


def _with_adapter(model: PreTrainedModel, recipe: Recipe, name: str) -> PreTrainedModel:
    if recipe.lora.rank > 0:
        AdapterSet(model, recipe.lora, name).add(name)
    return model


def _backbone(
    precision: Precision, *, is_shared: bool
) -> Callable[[PreTrainedModel, Batch], Tensor]:
    # What a GPU keeps for the backward pass is taken to be the same; compiled layers keep less.
    trial = precision.for_trial()

    def run(model: PreTrainedModel, batch: Batch) -> Tensor:
        if is_shared and not use_row_attention(model):
            raise ValueError(f"{type(model).__name__} has an attention of its own")
        with trial.forward_pass(model):
            output: Any = model.base_model(**batch.model_inputs, use_cache=False)
        return output.last_hidden_state

    return run


def _micro_batch(recipe: Recipe, num_responses: int) -> _MicroBatch:
    """The largest micro-batch, of groups as long as they may be."""
    data, batch = recipe.data, recipe.batch
    num_tokens = data.max_prompt_tokens + num_responses * data.max_response_tokens
    num_groups = max(1, batch.tokens_per_micro_batch // num_tokens)
    is_only = num_groups >= batch.prompts_per_step
    return _MicroBatch(min(num_groups, batch.prompts_per_step), num_responses, is_only)


def _longest(recipe: Recipe, size: _MicroBatch, *, is_shared: bool) -> Batch:
    """Responses as long as they may be, laid out as for training."""
    data, batch = recipe.data, recipe.batch
    prompt = np.zeros(data.max_prompt_tokens, dtype=np.int32)
    response = Response(np.zeros(data.max_response_tokens, dtype=np.int32), is_finished=True)
    items = [Item(prompt, [response] * size.num_responses)] * size.num_groups
    if not is_shared:
        num_rows = max(1, batch.tokens_per_micro_batch // data.max_tokens)
        num_rows = min(num_rows, batch.prompts_per_step * size.num_responses)
        items = [Item(prompt, [response])] * num_rows
    return lay_out(items, is_shared=is_shared, pad_id=0, device=torch.device("cpu"))


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
