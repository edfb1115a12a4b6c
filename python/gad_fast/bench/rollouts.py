"""Rollouts from live weights: the static engine against continuous batching and `generate`.

Question: how much faster than transformers' `generate` is sampling from the same weights in the
same process? All engines answer the same prompts, with natural ends, turn by turn, so that a slow
minute of the machine is a slow minute of all. `generate` goes on with finished rows until the last
one of its batch is done; a token counts only if it is in a rollout. The limit is the time of the
matrix products of the decode steps alone. A server of the same model, as vLLM's, may take part.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from gad_fast.bench.english import lines, passage
from gad_fast.bench.report import Comparison, Report
from gad_fast.bench.served import ServedEngine
from gad_fast.bench.timing import seconds
from gad_fast.config import HardwareSettings
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.records import Ids, Message
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, GenOutput, GenRequest, RolloutEngine, Sampling
from gad_fast.rollout.making import ENGINES
from gad_fast.text import TextCodec

TEMPERATURE = 0.8
SEED = 0
GOAL = 1.6
PEERS = {"reference": "transformers generate", "continuous": "continuous batching"}
PROMPT_CHARACTERS = 300


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
    """In all rollouts."""
    longest: int
    """Tokens of the longest, which is the number of decode steps."""
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Turn = dict[str, Sample]

SHAPE = Shape(8, 4, 192)
SMALL = Shape(2, 2, 6)
DTYPES = ("float32", "bfloat16")


def run(
    folder: Path,
    *,
    quick: bool,
    shapes: Sequence[Shape] = (SHAPE,),
    dtypes: Sequence[str] = DTYPES,
    num_turns: int = 3,
    server: str | None = None,
) -> Report:
    """Samples with all engines in turns, on the CPU.

    Args:
        folder: a language model with a chat template.
        quick: a few tokens, once.
        shapes: rollouts of a step.
        dtypes: of weights and products.
        num_turns: of all engines.
        server: address of a completions endpoint that serves the same model, in the same dtype and
            with as many threads.

    Raises:
        ModelError: there is no such model in the folder.
        EngineError: the server does not answer.
    """
    served = None if server is None else ServedEngine(server)
    if served is not None:
        served.start()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shapes, num_turns = ((SMALL,), 1) if quick else (shapes, num_turns)
    samples: dict[str, list[Turn]] = {}
    remarks: list[str] = []
    for dtype in dtypes:
        bench = Bench(folder, dtype, served)
        for shape, turns in bench.compare_all(shapes, num_turns):
            case = f"{dtype} {shape}"
            samples[case] = turns
            remarks.append(f"{case}: {bench.limit([turn['static'] for turn in turns])}")
    return _report(folder, samples, remarks, _peers(served), quick=quick)


def _report(
    folder: Path,
    samples: dict[str, list[Turn]],
    remarks: list[str],
    peers: dict[str, str],
    *,
    quick: bool,
) -> Report:
    return Report(
        name="rollouts",
        is_quick=quick,
        question="How much faster than `generate` are rollouts from the same weights? (on the CPU)",
        settings={
            "model": folder.resolve().name,
            "temperature": TEMPERATURE,
            "seed": SEED,
            "num_threads": torch.get_num_threads(),
        },
        comparisons=[
            _comparison(case, turns, peer, name)
            for case, turns in samples.items()
            for peer, name in peers.items()
        ],
        samples=_as_json(samples),
        remarks=remarks,
    )


class Bench:
    """A model, and prompts of a step in its tokens."""

    def __init__(self, folder: Path, dtype: str, served: ServedEngine | None = None) -> None:
        self.precision = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))
        self.model = load_causal_lm(str(folder), dtype=dtype, device=self.precision.device)
        self.codec = TextCodec.from_pretrained(str(folder))
        self._source, self._served = lines(), served
        self._dtype, self._names = dtype, [*ENGINES, *_peers(served).keys() - PEERS.keys()]

    def compare_all(
        self, shapes: Sequence[Shape], num_turns: int
    ) -> Iterator[tuple[Shape, list[Turn]]]:
        """Samples of all engines at each shape, after a check that they give the same."""
        if self._dtype == "float32":
            self.check_equal()
        self.compare(SMALL, 1)  # what is loaded once is not an engine's
        for shape in shapes:
            yield shape, self.compare(shape, num_turns)

    def check_equal(self) -> None:
        """Fails unless the likeliest tokens are the same by all engines."""
        prompts = self._prompts(SMALL.groups, SEED)
        found = [
            {
                o.group_id: o.response.ids.tolist()
                for o in self._outputs(name, SMALL, prompts, 0, 0.0)
            }
            for name in ENGINES
        ]
        assert all(answers == found[0] for answers in found), found

    def compare(self, shape: Shape, num_turns: int) -> list[Turn]:
        """Samples of all engines, each turn with prompts of its own."""
        turns: list[Turn] = []
        for turn in range(num_turns):
            prompts = self._prompts(shape.groups, SEED + turn)
            turns.append({name: self._measure(name, shape, prompts, turn) for name in self._names})
        return turns

    def limit(self, samples: Sequence[Sample]) -> str:
        """What the products of the static engine's decode steps allow, in words."""
        sample = samples[0]
        num_rows = round(sample.tokens / sample.longest)
        floor = sample.longest * products_seconds(self.model, num_rows)
        return (
            f"static {sample.rate:.1f} tokens/s; with nothing but the products of its decode steps "
            f"{sample.tokens / floor:.1f} ({num_rows} rows, the mean)"
        )

    def _prompts(self, count: int, seed: int) -> list[Ids]:
        generator = random.Random(seed)
        texts = [passage(self._source, generator, PROMPT_CHARACTERS) for _ in range(count)]
        chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
        return list(self.codec.encode_chats(chats, add_generation_prompt=True))

    def _measure(self, name: str, shape: Shape, prompts: Sequence[Ids], seed: int) -> Sample:
        start = time.perf_counter()
        outputs = self._outputs(name, shape, prompts, seed, TEMPERATURE)
        lengths = [len(output.response) for output in outputs]
        return Sample(sum(lengths), max(lengths), time.perf_counter() - start)

    def _outputs(
        self, name: str, shape: Shape, prompts: Sequence[Ids], seed: int, temperature: float
    ) -> Iterator[GenOutput]:
        engine = self._engine(name, shape)
        sampling = Sampling(temperature, shape.max_tokens)
        return engine.generate(
            [
                GenRequest(index, ids, shape.rollouts, sampling, seed)
                for index, ids in enumerate(prompts)
            ]
        )

    def _engine(self, name: str, shape: Shape) -> RolloutEngine:
        if name not in ENGINES:
            assert self._served is not None
            return self._served
        return ENGINES[name](
            self.model,
            self.precision,
            endings=Endings(self.codec.end_id),
            capacity=Capacity(shape.groups * shape.rollouts),
        )


def products_seconds(model: PreTrainedModel, num_rows: int) -> float:
    """Time of all linear layers, head included, on a token of so many rows."""
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(num_rows, layer.in_features, dtype=layer.weight.dtype)
        for layer in linears
    }

    def products() -> None:
        for layer in linears:
            functional.linear(inputs[layer.in_features], layer.weight)

    with torch.no_grad():
        return statistics.median(seconds(products) for _ in range(5))


def _peers(served: ServedEngine | None) -> dict[str, str]:
    """What the static engine is compared with: names of samples, and for people."""
    return PEERS if served is None else {**PEERS, "server": f"{served.owner} over HTTP"}


def _comparison(case: str, turns: Sequence[Turn], peer: str, name: str) -> Comparison:
    ratios = [turn["static"].rate / turn[peer].rate for turn in turns]
    return Comparison(case, name, ratios, goal=GOAL if peer == "reference" else None)


def _as_json(samples: dict[str, list[Turn]]) -> dict[str, list[dict[str, dict[str, float]]]]:
    return {
        case: [{name: sample._asdict() for name, sample in turn.items()} for turn in turns]
        for case, turns in samples.items()
    }
