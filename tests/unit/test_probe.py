"""Every way in which an engine can silently sample from another policy, provoked and caught."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from engines import CPU, PROMPTS, FakeEngine, OtherTemperature, llama, make
from gad_fast.config import HardwareSettings
from gad_fast.errors import EngineError
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student
from gad_fast.records import EncodedExample, Example, Group, Response
from gad_fast.rollout.continuous import ContinuousEngine
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.groups import GroupPlan, sample_groups
from gad_fast.rollout.probe import probe
from gad_fast.rollout.static.decoder import Decoder
from gad_fast.rollout.static.engine import StaticEngine

TEMPERATURE = 0.8
PLAN = GroupPlan(2, Sampling(TEMPERATURE, 12), seed=0, weight_version=0)
EXAMPLES = [
    EncodedExample(
        Example([{"role": "user", "content": "?"}], "yes"),
        np.array(prompt, dtype=np.int32),
        Response(np.array([4], np.int32), is_finished=True),
    )
    for prompt in (*PROMPTS, [1, 2, 8, 8, 8, 9, 3])
]


def groups_of(engine: Any) -> list[Group]:
    return sample_groups(engine, EXAMPLES, PLAN)


def gap(student: Student, groups: list[Group]) -> float | None:
    found = probe(student, groups, temperature=TEMPERATURE, token_budget=64)
    return None if found is None else found.mean


def updated(student: Student, step: float = 0.02) -> None:
    """An update of every weight in place, of about the size of a step's."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += step * torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("kind", [StaticEngine, ContinuousEngine])
def test_a_right_engine_passes_before_and_after_an_update(kind: type[Any]) -> None:
    student = Student(llama(), CPU)
    engine = make(kind, student.model)
    for _ in range(2):
        found = gap(student, groups_of(engine))
        assert found is not None
        assert found < 1e-5
        updated(student)


def test_a_right_engine_passes_in_bfloat16() -> None:
    precision = Precision(HardwareSettings(device="cpu", compute_dtype="bfloat16"))
    student = Student(llama(), precision)
    found = gap(student, groups_of(make(StaticEngine, student.model, precision=precision)))
    assert found is not None
    assert 1e-5 < found < 0.1


def test_an_engine_without_logprobs_is_not_probed() -> None:
    student = Student(llama(), CPU)
    groups = sample_groups(FakeEngine(version=0, logprobs=False), EXAMPLES, PLAN)
    assert gap(student, groups) is None


def test_an_update_that_does_not_reach_the_engine_is_caught() -> None:
    student = Student(llama(), CPU)
    engine = make(StaticEngine, copy.deepcopy(student.model))
    assert gap(student, groups_of(engine)) is not None
    updated(student)
    with pytest.raises(EngineError, match=r"does not sample from the student: .* nats off on aver"):
        gap(student, groups_of(engine))


def test_the_weights_of_another_run_are_caught() -> None:
    student = Student(llama(), CPU)
    with pytest.raises(EngineError, match="likely causes: weights or a tied head"):
        gap(student, groups_of(make(StaticEngine, llama(seed=1))))


def test_a_tied_head_that_an_update_does_not_reach_is_caught() -> None:
    student = Student(llama(tie_word_embeddings=True), CPU)
    replica: Any = copy.deepcopy(student.model)
    replica.lm_head.weight = torch.nn.Parameter(replica.lm_head.weight.detach().clone())
    engine = make(StaticEngine, replica)
    assert gap(student, groups_of(engine)) is not None
    updated(student)
    for name, parameter in replica.named_parameters():
        if name != "lm_head.weight":
            parameter.data.copy_(student.model.get_parameter(name))
    with pytest.raises(EngineError, match="does not sample from the student"):
        gap(student, groups_of(engine))


def test_a_prefix_cache_kept_over_an_update_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student(llama(), CPU)
    old, enter = copy.deepcopy(student.model), Decoder.enter

    def stale(self: Any, entries: Any) -> None:
        own, self._model = self._model, old
        enter(self, entries)
        self._model = own

    engine = make(StaticEngine, student.model)
    monkeypatch.setattr(Decoder, "enter", stale)
    assert gap(student, groups_of(engine)) is not None
    updated(student, 0.05)
    with pytest.raises(EngineError, match="a prefix cache kept over an update"):
        gap(student, groups_of(engine))


def test_another_temperature_is_caught() -> None:
    student = Student(llama(), CPU)
    with pytest.raises(EngineError, match="another temperature"):
        gap(student, groups_of(make(OtherTemperature, student.model)))


def test_logprobs_that_are_no_numbers_are_caught() -> None:
    student = Student(llama(), CPU)
    groups = groups_of(make(StaticEngine, student.model))
    broken = [
        Group(g.prompt, g.rollouts, [np.full(len(r), np.nan, np.float32) for r in g.rollouts])
        for g in groups
    ]
    with pytest.raises(EngineError, match="nan nats off"):
        gap(student, broken)
