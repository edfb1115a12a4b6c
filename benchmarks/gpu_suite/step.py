"""One whole step of the game on random weights of real shapes: seconds, memory and utilisation.

The weights are random, so rollouts end only at the token limit, and the discriminator learns
nothing: time and memory do not depend on either. The trainer's part is also run with the passes of
the paper's code, on the same shapes.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

from gad_fast.bench.step import Work, random_groups
from gad_fast.bench.trainer_passes import TEMPERATURE, Phases, Table, here, official
from gad_fast.config import (
    HardwareSettings,
    LearningRateSettings,
    LoraSettings,
    OptimizerSettings,
)
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.models.discriminator import Discriminator, Reader
from gad_fast.models.loading import Precision, scorer_on
from gad_fast.models.lora import AdapterSet
from gad_fast.models.student import Student
from gad_fast.records import Group
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, Sampling
from gad_fast.rollout.groups import GroupPlan, sample_groups
from gad_fast.rollout.static.engine import StaticEngine
from gpu_suite.cases import Case, Results, Row
from gpu_suite.ceilings import ceilings_of
from gpu_suite.model_flop import forward_flop, groups_read, training_flop
from gpu_suite.random_models import codec_of_two_tokens, random_examples, random_model
from gpu_suite.scale import Scale, StepSize
from gpu_suite.timing import synchronize


class Cost(NamedTuple):
    """What a phase costs."""

    seconds: float
    peak_gib: float | None
    """Most memory that was allocated in it; None on a CPU."""


def cases(scale: Scale, results: Results) -> list[Case]:
    """One step for each model, and then the paper's passes for each."""
    peak = ceilings_of(results).tflop_per_second * 1e12
    return [
        *(Case(size.name, functools.partial(_step, size, scale, peak)) for size in scale.steps),
        *(
            Case(f"{size.name}, paper's passes", functools.partial(_paper, size, scale, peak))
            for size in scale.steps
        ),
    ]


def _step(size: StepSize, scale: Scale, peak: float) -> list[Row]:
    players = _Players(size, scale)
    # A first, short step loads what is loaded once, and allocates the optimizers' moments.
    _play(players, size._replace(prompts=1, response_tokens=4), scale)
    gc.collect()
    rollout, phases = _play(players, size, scale)
    responses = size.prompts * size.group_size * size.response_tokens
    rows = [
        _row(size, "rollout", rollout, responses),
        *_trainer_rows(players, size, phases, peak),
    ]
    peaks = [row["peak_gib"] for row in rows if row["peak_gib"] is not None]
    whole = Cost(sum(row["seconds"] for row in rows), max(peaks, default=None))
    return [*rows, _row(size, "step", whole, responses)]


def _paper(size: StepSize, scale: Scale, peak: float) -> list[Row]:
    players = _Players(size, scale)
    _run(
        official(players.table(_random_groups(size._replace(prompts=1, response_tokens=4)))), scale
    )
    gc.collect()
    phases = _run(official(players.table(_random_groups(size))), scale)
    rows = _trainer_rows(players, size, phases, peak)
    return [{**row, "phase": f"{row['phase']}, paper's passes"} for row in rows]


class _Players:
    """Student, its frozen reference, discriminator and engine, as a run of the command has them."""

    def __init__(self, size: StepSize, scale: Scale) -> None:
        self._size = size
        precision = Precision(
            HardwareSettings(
                device=scale.device,
                compute_dtype=scale.dtype,
                gradient_checkpointing=size.lora_rank > 0,
            )
        )
        codec = codec_of_two_tokens()
        torch.manual_seed(0)
        make = _with_adapters if size.lora_rank else _with_all_weights
        self.student, self.discriminator = make(size, precision, Reader(codec, None))
        self.reference = self.student.frozen_copy()
        self._optimizers = [
            _optimizer(name, player)
            for name, player in (("student", self.student), ("discriminator", self.discriminator))
        ]
        self.engine = StaticEngine(
            self.student.model,
            precision,
            endings=Endings(codec.end_id),
            capacity=Capacity(size.prompts * size.group_size),
        )

    def table(self, groups: list[Group]) -> Table:
        """What the trainer's passes work on."""
        return Table(
            self.student,
            self.reference,
            self.discriminator,
            *self._optimizers,
            groups=groups,
            token_budget=self._size.tokens_per_micro_batch,
            padded_rows=self._size.padded_rows,
        )


def _with_all_weights(
    size: StepSize, precision: Precision, reader: Reader
) -> tuple[Student, Discriminator]:
    model, scorer = (
        random_model(kind, size.model, precision, size.max_tokens, **options)
        for kind, options in (
            (Qwen2ForCausalLM, {}),
            (Qwen2ForSequenceClassification, {"num_labels": 1}),
        )
    )
    return Student(model, precision), Discriminator(scorer, precision, reader)


def _with_adapters(
    size: StepSize, precision: Precision, reader: Reader
) -> tuple[Student, Discriminator]:
    """Both on one set of frozen weights in bfloat16."""
    model = random_model(Qwen2ForCausalLM, size.model, precision, size.max_tokens)
    model.to(torch.bfloat16)
    adapters = AdapterSet(model, LoraSettings(rank=size.lora_rank), size.name)
    student = Student(model, precision, adapter=adapters.add("student"))
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        scorer = scorer_on(model, folder)
    adapter = adapters.add("discriminator")
    return student, Discriminator(scorer, precision, reader, adapter=adapter)


def _play(players: _Players, size: StepSize, scale: Scale) -> tuple[Cost, dict[str, Cost]]:
    """Costs of the rollouts, and of the trainer's phases on them."""
    prompts = random_examples(
        size.model,
        size.prompts,
        prompt_tokens=size.prompt_tokens,
        response_tokens=size.response_tokens,
    )
    sampling = Sampling(TEMPERATURE, size.response_tokens)
    plan = GroupPlan(size.group_size, sampling, seed=0, weight_version=0)
    players.student.activate()
    groups, rollout = _timed(lambda: sample_groups(players.engine, prompts, plan), scale)
    return rollout, _run(here(players.table(groups)), scale)


def _random_groups(size: StepSize) -> list[Group]:
    work = Work(
        size.prompts,
        size.group_size,
        size.prompt_tokens,
        size.response_tokens,
        size.tokens_per_micro_batch,
    )
    return random_groups(work, size.model["vocab_size"])


def _trainer_rows(
    players: _Players, size: StepSize, phases: dict[str, Cost], peak: float
) -> list[Row]:
    """With the share of the device's arithmetic that the game's own operations are."""
    flop = _trainer_flop(players, size)
    responses = size.group_size * size.response_tokens
    tokens = size.prompts * (size.group_size * size.prompt_tokens + responses)
    return [
        {**_row(size, name, cost, tokens), "mfu": flop[name] / cost.seconds / peak}
        for name, cost in phases.items()
    ]


def _trainer_flop(players: _Players, size: StepSize) -> dict[str, float]:
    own = groups_read(size.prompts, size.prompt_tokens, (size.group_size, size.response_tokens))
    judged = groups_read(
        size.prompts, size.prompt_tokens, (size.group_size + 1, size.response_tokens)
    )
    model = players.student.model
    reference = forward_flop(model, own, has_head=True)
    return {
        "discriminator": training_flop(players.discriminator.model, judged, has_head=False),
        "student": training_flop(model, own, has_head=True) + reference,
    }


def _row(size: StepSize, phase: str, cost: Cost, num_tokens: int) -> Row:
    return {
        "model": size.name,
        "phase": phase,
        "seconds": cost.seconds,
        "tokens_per_second": num_tokens / cost.seconds,
        "peak_gib": cost.peak_gib,
        "mfu": None,
    }


def _run(phases: Phases, scale: Scale) -> dict[str, Cost]:
    """Costs of the phases by name."""
    found: dict[str, Cost] = {}
    while True:
        name, cost = _timed(lambda: next(phases, None), scale)
        if name is None:
            return found
        found[name] = cost


def _timed(run: Callable[[], Any], scale: Scale) -> tuple[Any, Cost]:
    """The result of a phase, and what it costs."""
    synchronize(scale.device)
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    synchronize(scale.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if scale.device == "cuda" else None
    return result, Cost(seconds, peak)


def _optimizer(name: str, player: Student | Discriminator) -> PlayerOptimizer:
    optimizer = PlayerOptimizer(name, player.trainable_parameters(), OptimizerSettings())
    optimizer.begin_stage(LearningRateSettings(), 2)
    return optimizer
