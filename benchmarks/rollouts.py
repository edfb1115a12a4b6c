"""Useful tokens a second of the engines in process, and where the static engine's time goes.

Question: how much faster than transformers' `generate` is sampling from the same weights in the
same process? A token is useful if it is in a rollout; `generate` goes on with finished rows until
the last one is done. All engines answer the same prompts, with natural ends, turn by turn, so that
a slow minute of the machine is a slow minute of all.

    python benchmarks/rollouts.py [--output benchmarks/results/rollouts.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from gad_fast.config import HardwareSettings
from gad_fast.data.reading import read_prompts
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.rollout.continuous import ContinuousEngine
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, GenRequest, Sampling
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.rollout.static import engine as static_engine
from gad_fast.rollout.static.decoder import Decoder
from gad_fast.rollout.static.engine import StaticEngine
from gad_fast.text import TextCodec

STUDENT = "models/SmolLM2-135M-Instruct"
PROMPTS = "data/quickstart_prompts.jsonl"
TEMPERATURE = 0.8
ENGINES = {"static": StaticEngine, "continuous": ContinuousEngine, "reference": ReferenceEngine}
PHASES = {
    "prefill": (Decoder, "enter"),
    "decode": (Decoder, "step"),
    "sampling": (static_engine, "draw"),
    "cache moves": (Decoder, "move"),
}
"""What the static engine spends its time in, and the functions that do it."""


class Shape(NamedTuple):
    """A step's rollouts."""

    groups: int
    rollouts: int
    max_tokens: int

    def __str__(self) -> str:
        return f"{self.groups}x{self.rollouts}x{self.max_tokens}"


class Sample(NamedTuple):
    """One turn of an engine."""

    tokens: int
    seconds: float
    phases: dict[str, float]

    @property
    def rate(self) -> float:
        """Useful tokens a second."""
        return self.tokens / self.seconds


SHAPES = (Shape(8, 4, 192), Shape(16, 8, 256))
SMOKE = (Shape(2, 2, 6),)


@contextmanager
def timed_phases() -> Generator[dict[str, float]]:
    """Seconds spent in each phase of the static engine."""
    seconds = dict.fromkeys(PHASES, 0.0)
    own = {name: getattr(owner, attribute) for name, (owner, attribute) in PHASES.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = own[name](*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, timed(name))
    try:
        yield seconds
    finally:
        for name, (owner, attribute) in PHASES.items():
            setattr(owner, attribute, own[name])


class Bench:
    """A student, and prompts of a step in its tokens."""

    def __init__(self, dtype: str) -> None:
        self.precision = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))
        self.model = load_causal_lm(STUDENT, dtype=dtype, device=self.precision.device)
        self.codec = TextCodec.from_pretrained(STUDENT)
        chats = read_prompts(PROMPTS, None)
        self.prompts = list(self.codec.encode_chats(chats, add_generation_prompt=True))

    def measure(self, name: str, shape: Shape, seed: int) -> Sample:
        """One turn."""
        sampling = Sampling(TEMPERATURE, shape.max_tokens)
        requests = [
            GenRequest(index, self.prompts[index], shape.rollouts, sampling, seed)
            for index in range(shape.groups)
        ]
        engine = ENGINES[name](
            self.model,
            self.precision,
            endings=Endings(self.codec.end_id),
            capacity=Capacity(shape.groups * shape.rollouts, longest_sequence=2048),
        )
        with timed_phases() as phases:
            start = time.perf_counter()
            tokens = sum(len(output.response) for output in engine.generate(requests))
            seconds = time.perf_counter() - start
        return Sample(tokens, seconds, phases if name == "static" else {})


def compare(bench: Bench, shape: Shape, repeats: int) -> dict[str, Any]:
    """Medians of all engines, and of their ratios to `generate` in the same turn."""
    turns = [
        {name: bench.measure(name, shape, seed) for name in ENGINES} for seed in range(repeats)
    ]
    return {
        name: {
            "tokens_per_second": statistics.median(turn[name].rate for turn in turns),
            "times_reference": statistics.median(
                turn[name].rate / turn["reference"].rate for turn in turns
            ),
            "samples": [turn[name]._asdict() for turn in turns],
        }
        for name in ENGINES
    }


def show(dtype: str, shape: Shape, figures: dict[str, Any]) -> None:
    """Prints a line an engine, and the shares of the static engine's phases."""
    for name, figure in figures.items():
        print(
            f"{dtype:9} {shape!s:10} {name:11} {figure['tokens_per_second']:7.1f} tokens/s  "
            f"x{figure['times_reference']:.2f}"
        )
    samples = figures["static"]["samples"]
    total = sum(sample["seconds"] for sample in samples)
    shares = {n: sum(s["phases"][n] for s in samples) / total for n in PHASES}
    print(" " * 21, ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line for line in lines if line.startswith("model name")).split(": ")[1]


def main() -> None:
    """Print rates and ratios; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--smoke", action="store_true", help="a few tokens, once")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for dtype in arguments.dtypes:
        bench = Bench(dtype)
        for name in ENGINES:  # what is loaded when an engine first runs is not the engine's
            bench.measure(name, SMOKE[0], seed=0)
        for shape in SMOKE if arguments.smoke else SHAPES:
            figures = compare(bench, shape, 1 if arguments.smoke else arguments.repeats)
            show(dtype, shape, figures)
            results[f"{dtype} {shape}"] = figures
    if arguments.output:
        record = {
            "student": STUDENT,
            "threads": arguments.threads,
            "processor": _processor(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
