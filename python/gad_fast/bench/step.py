"""The trainer's part of a step, against the passes of the paper's code and without each saving.

Question: what is each saving worth on this machine, and all of them together? Prompts and responses
are random tokens of full length, so that every variant does the same work. Every measurement has a
process of its own, turn by turn, so that none warms another's caches or allocator.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from gad_fast.bench.report import Comparison, Report
from gad_fast.bench.trainer_passes import VARIANTS, Table, Variant
from gad_fast.config import LearningRateSettings, OptimizerSettings, Recipe
from gad_fast.errors import ConfigError
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student, load_student
from gad_fast.records import EncodedExample, Example, Group, Response
from gad_fast.text import TextCodec

LEARNING_RATE = 1e-6
GOALS = {"float32": 2.5, "bfloat16": 2.0}
"""Times as fast as the paper's passes, by the dtype of the matrix products."""
STATUS = Path("/proc/self/status")

Sample = dict[str, float]
"""Seconds by phase, and the process's peak of memory in GiB."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step works on."""

    prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_micro_batch: int
    """The paper's passes take 16 padded rows at once."""


WORK = Work(4, 4, 64, 64, 2048)
QUICK_WORK = Work(2, 2, 12, 6, 1024)


def run(model: Path, *, quick: bool, num_turns: int = 3) -> Report:
    """Measures every variant in turns, each in a child process.

    Args:
        model: folder of the student; the discriminator gets the same backbone.
        quick: a small run, once.
        num_turns: of all variants.

    Raises:
        ConfigError: there is no model, or this is not Linux, which alone tells a process its peak
            of memory.
    """
    if not STATUS.exists():
        raise ConfigError("bench step reads peak memory from /proc, which only Linux has")
    if not (model / "config.json").is_file():
        raise ConfigError(f"there is no config.json in {model} (--model wants a model's folder)")
    work, num_steps, num_turns = (QUICK_WORK, 2, 1) if quick else (WORK, 3, num_turns)
    threads = torch.get_num_threads()

    def turn(dtype: str) -> dict[str, Sample]:
        words = (str(model), asdict(work), dtype, num_steps, threads)
        return {name: _measure_in_child(name, *words) for name in VARIANTS}

    turns = {dtype: [turn(dtype) for _ in range(num_turns)] for dtype in GOALS}
    return Report(
        name="step",
        is_quick=quick,
        question="How much faster is training on a step's rollouts than by the paper's passes?",
        settings={"model": model.name, **asdict(work), "steps": num_steps, "num_threads": threads},
        comparisons=[row for dtype in GOALS for row in _comparisons(dtype, turns[dtype])],
        samples=turns,
    )


def measure(
    name: str, model: str, work: dict[str, int], dtype: str, num_steps: int, threads: int
) -> Sample:
    """Medians of steps of one variant after a first one, and the peak of memory.

    To be called in a process that has run nothing else.
    """
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    variant = VARIANTS[name]
    table = set_up(model, Work(**work), dtype, variant)
    samples = [_timed(table, variant) for _ in range(num_steps)][1:]
    seconds = {
        phase: statistics.median(sample[phase] for sample in samples) for phase in samples[0]
    }
    return {**seconds, "peak_gib": _peak_gib()}


def set_up(model: str, work: Work, dtype: str, variant: Variant) -> Table:
    """Players from a model's folder, and random groups for them; always the same."""
    torch.manual_seed(0)
    recipe = Recipe.from_values(
        {
            "name": "step",
            "output": "unused",
            "student": {"model": model},
            "data": {
                "train": "unused",
                "max_prompt_tokens": work.prompt_tokens,
                "max_response_tokens": work.response_tokens,
            },
            "warmup": {"steps": 0},
            "game": {"steps": 1},
            "hardware": {"compute_dtype": dtype, **variant.hardware},
        }
    )
    precision = Precision(recipe.hardware)
    codec = TextCodec.from_pretrained(model)
    student = load_student(recipe, precision)
    discriminator = load_discriminator(recipe, student, codec, precision)
    return Table(
        student=student,
        reference=student.frozen_copy(),
        discriminator=discriminator,
        student_optimizer=_optimizer("student", student),
        discriminator_optimizer=_optimizer("discriminator", discriminator),
        groups=random_groups(work, codec.num_tokens),
        token_budget=work.tokens_per_micro_batch,
    )


def random_groups(work: Work, num_tokens: int) -> list[Group]:
    """Groups of random tokens of a vocabulary."""
    generator = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return generator.integers(num_tokens, size=count).astype(np.int32)

    def response() -> Response:
        return Response(ids(work.response_tokens), is_finished=False)

    return [
        Group(
            EncodedExample(Example([], ""), ids(work.prompt_tokens), response()),
            [response() for _ in range(work.group_size)],
        )
        for _ in range(work.prompts)
    ]


def _measure_in_child(name: str, *words: Any) -> Sample:
    # -P: not with the modules of the folder that this was started in.
    command = [sys.executable, "-P", "-m", "gad_fast.bench.step", json.dumps([name, *words])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def _comparisons(dtype: str, turns: list[dict[str, Sample]]) -> list[Comparison]:
    case = f"the game's passes, {dtype}"
    peers = [name for name in VARIANTS if name != "here"]
    speeds = [
        Comparison(
            case,
            name,
            [turn[name]["step"] / turn["here"]["step"] for turn in turns],
            goal=GOALS[dtype] if name == "official" else None,
        )
        for name in peers
    ]
    memory = [turn["here"]["peak_gib"] / turn["official"]["peak_gib"] for turn in turns]
    return [*speeds, Comparison(case, "official", memory, of="memory")]


def _timed(table: Table, variant: Variant) -> Sample:
    start = last = time.perf_counter()
    seconds: Sample = {}
    for phase in variant.step(table):
        last, before = time.perf_counter(), last
        seconds[phase] = last - before
    return {**seconds, "step": last - start}


def _peak_gib() -> float:
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def _optimizer(player: str, module: Student | Discriminator) -> PlayerOptimizer:
    optimizer = PlayerOptimizer(player, module.trainable_parameters(), OptimizerSettings())
    optimizer.begin_stage(LearningRateSettings(peak=LEARNING_RATE), 100)
    return optimizer


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))  # noqa: T201
