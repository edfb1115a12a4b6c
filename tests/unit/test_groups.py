"""Whole groups from an engine's single rollouts, in whatever order and from whatever weights."""

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engines import CPU, END, FakeEngine, llama
from gad_fast.errors import ConfigError
from gad_fast.records import EncodedExample, Example, Response
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, GenOutput, GenRequest, RolloutEngine, Sampling
from gad_fast.rollout.groups import GroupPlan, GroupsError, iter_groups, sample_groups
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.rollout.static.engine import StaticEngine

PROMPTS = [
    EncodedExample(
        Example([{"role": "user", "content": str(length)}], "yes"),
        np.arange(1, length, dtype=np.int32),
        Response(np.array([7, 2], np.int32), is_finished=True),
    )
    for length in (4, 2, 6)
]
PLAN = GroupPlan(3, Sampling(1.0, 8), seed=0, weight_version=3)


def test_groups_come_in_the_order_of_the_prompts_with_their_own_rollouts() -> None:
    groups = sample_groups(FakeEngine(), PROMPTS, PLAN)
    assert [group.prompt for group in groups] == PROMPTS
    for group_id, group in enumerate(groups):
        assert group.logprobs is not None
        found = {
            (rollout.ids.tobytes(), rollout.is_finished, logprobs.tobytes())
            for rollout, logprobs in zip(group.rollouts, group.logprobs, strict=True)
        }
        expected = [FakeEngine.response(group_id, k) for k in range(3)]
        assert found == {
            (r.ids.tobytes(), r.is_finished, np.full(k + 1, -(group_id + k / 8), "f4").tobytes())
            for k, r in enumerate(expected)
        }


def test_an_engine_without_logprobs_gives_groups_without() -> None:
    groups = sample_groups(FakeEngine(logprobs=False), PROMPTS, PLAN)
    assert [group.logprobs for group in groups] == [None] * 3


def test_each_group_is_handed_on_when_it_is_complete() -> None:
    """The engine waits for ever after the first two groups; they come all the same."""
    release = threading.Event()
    engine: RolloutEngine = FakeEngine(missing=3, hangs=release)
    groups = iter_groups(engine, PROMPTS, PLAN)
    assert [next(groups).index, next(groups).index] == [2, 1]
    release.set()


def test_rollouts_of_older_weights_stop_the_run() -> None:
    with pytest.raises(GroupsError, match=r"gave 0 of 3 whole groups of weight version 3 \(3 were"):
        sample_groups(FakeEngine(version=2), PROMPTS, PLAN)


def test_missing_rollouts_stop_the_run() -> None:
    with pytest.raises(GroupsError, match="gave 2 of 3 whole groups"):
        sample_groups(FakeEngine(missing=1), PROMPTS, PLAN)


def test_a_failure_carries_the_engines_words_and_the_complete_groups() -> None:
    with pytest.raises(GroupsError, match=r"said 500 \(1 of 3 groups are complete\)") as caught:
        sample_groups(FakeEngine(missing=4, fails=True), PROMPTS, PLAN)
    (found,) = caught.value.found
    assert found.index == 2
    assert sorted(map(len, found.group.rollouts)) == [1, 2, 3]


def test_groups_that_are_there_are_not_sampled_again() -> None:
    """The others keep their own numbers, and so their own random streams."""
    expected = sample_groups(FakeEngine(), PROMPTS, PLAN)
    kept = {1: replace(expected[1])}
    # Its two groups are asked for and come: six rollouts, and none is missing.
    groups = sample_groups(FakeEngine(), PROMPTS, PLAN, kept=kept)
    assert groups[1] is kept[1]
    for index in (0, 2):
        found = {rollout.ids.tobytes() for rollout in groups[index].rollouts}
        assert found == {FakeEngine.response(index, k).ids.tobytes() for k in range(3)}
    with pytest.raises(GroupsError, match="gave 1 of 2 whole groups") as caught:
        sample_groups(FakeEngine(missing=1), PROMPTS, PLAN, kept=kept)
    assert [found.index for found in caught.value.found] == [2]


def test_an_engine_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    engine = FakeEngine(missing=2, hangs=release)
    with pytest.raises(GroupsError, match=r"no rollout for 0 s .*\(2 of 3 groups") as caught:
        sample_groups(engine, PROMPTS, replace(PLAN, timeout_seconds=0.05))
    release.set()
    assert [found.index for found in caught.value.found] == [2, 1]


class _Noted(FakeEngine):
    """Notes the thread that it answers in."""

    thread: threading.Thread | None = None

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        self.thread = threading.current_thread()
        yield from super().generate(requests)


def test_an_engine_samples_in_the_callers_thread_unless_it_may_hang() -> None:
    engine = _Noted()
    assert len(sample_groups(engine, PROMPTS, PLAN)) == 3
    assert engine.thread is not threading.current_thread()
    engine.caps = replace(engine.caps, may_hang=False)
    assert len(sample_groups(engine, PROMPTS, PLAN)) == 3
    assert engine.thread is threading.current_thread()


@pytest.mark.parametrize("kind", [StaticEngine, ReferenceEngine])
@pytest.mark.parametrize(("device", "may_hang"), [("cpu", False), ("cuda", True)])
def test_engines_in_process_may_hang_where_they_wait_for_a_device(
    kind: type[Any], device: str, may_hang: bool
) -> None:
    precision = copy.copy(CPU)
    precision.device = torch.device(device)
    engine = kind(llama(), precision, endings=Endings(END), capacity=Capacity(1))
    assert engine.caps.may_hang is may_hang


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"stop": ("\n",)}])
def test_cut_distributions_are_not_learned_from(cut: dict[str, object]) -> None:
    sampling = Sampling(1.0, 8, **cut)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="drawn from the whole distribution, got top_k"):
        sample_groups(FakeEngine(), PROMPTS, replace(PLAN, sampling=sampling))
