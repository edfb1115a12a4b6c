"""Whole groups from an engine's single rollouts, in whatever order and from whatever weights."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from gad_fast.errors import EngineError
from gad_fast.records import EncodedExample, Example, Response
from gad_fast.rollout.engine import GenOutput, GenRequest, Sampling
from gad_fast.rollout.groups import sample_groups

PROMPTS = [
    EncodedExample(
        Example([{"role": "user", "content": str(length)}], "yes"),
        np.arange(1, length, dtype=np.int32),
        Response(np.array([7, 2], np.int32), is_finished=True),
    )
    for length in (4, 2, 6)
]


class ShuffledEngine:
    """Answers prompt g with rollouts [10 g + k] * (k + 1), last ones first."""

    def __init__(self, *, version: int = 3, missing: int = 0) -> None:
        self.version, self.missing = version, missing

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        outputs = [
            GenOutput(r.group_id, self.response(r.group_id, k), None, self.version)
            for r in requests
            for k in range(r.n)
        ]
        return iter(outputs[self.missing :][::-1])

    @staticmethod
    def response(group_id: int, k: int) -> Response:
        return Response(np.full(k + 1, 10 * group_id + k, np.int32), is_finished=k % 2 == 0)


def sample(engine: ShuffledEngine):
    return sample_groups(
        engine,  # pyright: ignore[reportArgumentType]  (it is all that is asked of one)
        PROMPTS,
        group_size=3,
        sampling=Sampling(1.0, 8),
        seed=0,
        weight_version=3,
    )


def test_groups_come_in_the_order_of_the_prompts_with_their_own_rollouts():
    groups = sample(ShuffledEngine())
    assert [group.prompt for group in groups] == PROMPTS
    for group_id, group in enumerate(groups):
        found = {(rollout.ids.tobytes(), rollout.is_finished) for rollout in group.rollouts}
        expected = [ShuffledEngine.response(group_id, k) for k in range(3)]
        assert found == {(rollout.ids.tobytes(), rollout.is_finished) for rollout in expected}


def test_rollouts_of_older_weights_stop_the_run():
    with pytest.raises(EngineError, match=r"gave 0 of 3 whole groups of weight version 3 \(3 were"):
        sample(ShuffledEngine(version=2))


def test_missing_rollouts_stop_the_run():
    with pytest.raises(EngineError, match="gave 2 of 3 whole groups"):
        sample(ShuffledEngine(missing=1))
