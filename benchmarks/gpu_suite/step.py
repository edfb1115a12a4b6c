"""One whole step of the game on random weights of real shapes: seconds and memory by phase.

The weights are random, so rollouts end only at the token limit, and the discriminator learns
nothing: time and memory do not depend on either.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

from gad_fast import kernels
from gad_fast.config import HardwareSettings, LearningRateSettings, OptimizerSettings
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.steps import train_discriminator, train_student
from gad_fast.models.discriminator import Discriminator, Reader
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, Sampling
from gad_fast.rollout.groups import GroupPlan, sample_groups
from gad_fast.rollout.static.engine import StaticEngine
from gpu_suite.cases import Case, Results, Row
from gpu_suite.random_models import codec_of_two_tokens, random_examples, random_model
from gpu_suite.scale import Scale, StepSize
from gpu_suite.timing import synchronize

TEMPERATURE = 0.8


def cases(scale: Scale, results: Results) -> list[Case]:
    """One step for each model."""
    del results
    return [Case(size.name, functools.partial(_step, size, scale)) for size in scale.steps]


def _step(size: StepSize, scale: Scale) -> list[Row]:
    players = _Players(size, scale)
    # A first, short step loads what is loaded once, and allocates the optimizers' moments.
    _play(players, size, scale, num_prompts=1, response_tokens=4)
    gc.collect()
    return _play(
        players, size, scale, num_prompts=size.prompts, response_tokens=size.response_tokens
    )


class _Players:
    """Student, its frozen reference, discriminator and engine, as a run of the command has them."""

    def __init__(self, size: StepSize, scale: Scale) -> None:
        precision = Precision(HardwareSettings(device=scale.device, compute_dtype=scale.dtype))
        codec = codec_of_two_tokens()
        max_tokens = size.prompt_tokens + size.response_tokens
        torch.manual_seed(0)
        model = random_model(Qwen2ForCausalLM, size.model, precision, max_tokens)
        scorer = random_model(
            Qwen2ForSequenceClassification, size.model, precision, max_tokens, num_labels=1
        )
        self.student = Student(model, precision)
        self.reference = self.student.frozen_copy()
        self.discriminator = Discriminator(scorer, precision, Reader(codec, None))
        self.student_optimizer = _optimizer("student", self.student)
        self.discriminator_optimizer = _optimizer("discriminator", self.discriminator)
        num_sequences = size.prompts * size.group_size
        self.engine = StaticEngine(
            model,
            precision,
            endings=Endings(codec.end_id),
            capacity=Capacity(num_sequences),
        )


def _play(
    players: _Players, size: StepSize, scale: Scale, *, num_prompts: int, response_tokens: int
) -> list[Row]:
    prompts = random_examples(
        size.model, num_prompts, prompt_tokens=size.prompt_tokens, response_tokens=response_tokens
    )
    sampling = Sampling(TEMPERATURE, response_tokens)
    plan = GroupPlan(size.group_size, sampling, seed=0, weight_version=0)
    groups, rollout = _timed(lambda: sample_groups(players.engine, prompts, plan), scale)
    budget = size.tokens_per_micro_batch
    verdict, discriminator = _timed(
        lambda: train_discriminator(
            players.discriminator, players.discriminator_optimizer, groups, token_budget=budget
        ),
        scale,
    )
    metrics, student = _timed(
        lambda: train_student(
            players.student, players.reference, players.student_optimizer, groups,
            kernels.group_advantages(verdict.scores), kl_coef=0.001, temperature=TEMPERATURE,
            token_budget=budget,
        ),
        scale,
    )  # fmt: skip
    responses = sum(len(rollout) for group in groups for rollout in group.rollouts)
    read = responses + num_prompts * size.group_size * size.prompt_tokens
    phases = [("rollout", rollout, responses), ("discriminator", discriminator, read)]
    rows = [_row(size, *phase) for phase in (*phases, ("student", student, read))]
    return [*rows, _whole(size, rows, responses, metrics["policy_loss"])]


def _row(size: StepSize, phase: str, cost: tuple[float, float | None], num_tokens: int) -> Row:
    seconds, peak_gib = cost
    return {
        "model": size.name,
        "phase": phase,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "peak_gib": peak_gib,
    }


def _whole(size: StepSize, rows: list[Row], num_rollout_tokens: int, loss: float) -> Row:
    peaks = [row["peak_gib"] for row in rows if row["peak_gib"] is not None]
    seconds = sum(row["seconds"] for row in rows)
    cost = (seconds, max(peaks) if peaks else None)
    return {**_row(size, "step", cost, num_rollout_tokens), "policy_loss": loss}


def _timed(run: Callable[[], Any], scale: Scale) -> tuple[Any, tuple[float, float | None]]:
    """The result of a phase, its seconds, and the most memory that was allocated in it."""
    synchronize(scale.device)
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    synchronize(scale.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if scale.device == "cuda" else None
    return result, (seconds, peak)


def _optimizer(player: str, module: torch.nn.Module) -> PlayerOptimizer:
    optimizer = PlayerOptimizer(player, module.parameters(), OptimizerSettings())
    optimizer.begin_stage(LearningRateSettings(), 2)
    return optimizer
