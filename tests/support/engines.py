"""Engines that are fake or broken, and small requests for real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

import tiny
from gad_fast.config import HardwareSettings
from gad_fast.errors import EngineError
from gad_fast.models.loading import Precision
from gad_fast.records import Response
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import (
    Capacity,
    EngineCaps,
    FinishReason,
    GenOutput,
    GenRequest,
    Sampling,
    SyncReport,
    WeightSource,
)
from gad_fast.rollout.static.engine import StaticEngine

END = 4
CPU = Precision(HardwareSettings(device="cpu", compute_dtype="float32"))
PROMPTS = [[1, 2, 7, 3], [1, 2, 7, 8, 9, 10, 3], [5], [1, 2, 9, 3]]


def llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny.llama_config(**overrides)).eval()


def requests(
    n: int, sampling: Sampling, prompts: Sequence[list[int]] = PROMPTS, seed: int = 11
) -> list[GenRequest]:
    """One for each prompt, numbered from 0."""
    return [
        GenRequest(group_id, np.array(prompt, dtype=np.int32), n, sampling, seed)
        for group_id, prompt in enumerate(prompts)
    ]


def make(kind: type[Any], model: Any, rows: int = 64, **options: Any) -> Any:
    """A started engine with room for so many rollouts."""
    options = {"endings": Endings(END), "capacity": Capacity(rows, longest_sequence=40), **options}
    engine = kind(model, options.pop("precision", CPU), **options)
    engine.start()
    return engine


def tokens(outputs: Iterator[GenOutput]) -> dict[tuple[int, int], list[int]]:
    """The ids of each rollout by its group and number."""
    found = list(outputs)
    by_rollout = {(o.group_id, o.rollout_index): o.response.ids.tolist() for o in found}
    assert len(by_rollout) == len(found)
    return by_rollout


class FakeEngine:
    """Answers prompt g with rollouts [10 g + k] * (k + 1), the last ones first.

    Args:
        version: of the weights it claims to sample from.
        missing: so many of the last outputs never come.
        fails: it then fails instead of ending.
        hangs: it then waits for this event.
    """

    def __init__(
        self,
        *,
        version: int = 3,
        missing: int = 0,
        fails: bool = False,
        hangs: threading.Event | None = None,
        logprobs: bool = True,
    ) -> None:
        self.version, self.missing, self.fails, self.hangs = version, missing, fails, hangs
        self.caps = EngineCaps(logprobs=logprobs, in_place=False)

    def start(self) -> None:
        pass

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        outputs = [self._output(r.group_id, k) for r in requests for k in range(r.n)][::-1]
        yield from outputs[: len(outputs) - self.missing]
        if self.fails:
            raise EngineError("the server said 500")
        if self.hangs is not None:
            self.hangs.wait()

    def sync_weights(self, source: WeightSource, version: int) -> SyncReport:
        self.version = version
        return SyncReport(version, num_tensors=len(source.metadata()), seconds=0.0)

    def health(self) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def response(group_id: int, k: int) -> Response:
        return Response(np.full(k + 1, 10 * group_id + k, np.int32), is_finished=k % 2 == 0)

    def _output(self, group_id: int, k: int) -> GenOutput:
        response = self.response(group_id, k)
        logprobs = np.full(k + 1, -(group_id + k / 8), np.float32) if self.caps.logprobs else None
        reason = FinishReason.END if response.is_finished else FinishReason.LENGTH
        return GenOutput(group_id, k, response, logprobs, reason, self.version)


class OtherTemperature(StaticEngine):
    """Samples at another temperature than it is asked for, unless that is 0."""

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        wrong = [
            replace(request, sampling=replace(request.sampling, temperature=1.1))
            if request.sampling.temperature
            else request
            for request in requests
        ]
        return super().generate(wrong)
