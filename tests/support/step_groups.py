"""Groups of random tokens for the losses of a step."""

from __future__ import annotations

import numpy as np

from gad_fast.records import EncodedExample, Example, Group, Ids, Response


def some_groups() -> list[Group]:
    """Two groups of two rollouts, in the tokens of `tiny`, no two of equal length."""
    random = np.random.default_rng(5)

    def ids(count: int) -> Ids:
        return random.integers(6, 16, count).astype(np.int32)

    def group(prompt: int, teacher: int, rollouts: tuple[int, ...]) -> Group:
        example = Example([{"role": "user", "content": ""}], "")
        encoded = EncodedExample(example, ids(prompt), Response(ids(teacher), is_finished=False))
        return Group(encoded, [Response(ids(count), is_finished=False) for count in rollouts])

    return [group(3, 4, (2, 5)), group(6, 1, (3, 7))]
