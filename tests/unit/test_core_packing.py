"""Packing keeps its budget and loses nothing; balancing is even; both are deterministic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gad_fast import _core

Column = NDArray[np.int64]

LENGTHS = st.lists(st.integers(0, 120), max_size=200)
GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=4), st.integers(0, 9)),
    max_size=20,
)


def int64(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def lists(bins: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list[list[int]]:
    indices, offsets = bins
    assert indices.dtype == offsets.dtype == np.int64
    return [part.tolist() for part in np.split(indices, offsets[1:-1])] if len(offsets) > 1 else []


def pack(lengths: list[int], **limits: Any) -> list[list[int]]:
    return lists(_core.pack_sequences(int64(lengths), **limits))


def best_fit_decreasing(lengths: list[int], token_budget: int) -> list[int]:
    """The rooms left in the bins, as the book fills them: by looking at every bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else token_budget) - length)
    return sorted(rooms)


@given(LENGTHS, st.integers(1, 300))
def test_bins_are_as_full_as_those_of_the_book(lengths: list[int], token_budget: int) -> None:
    bins = pack(lengths, token_budget=token_budget)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    rooms = [token_budget - sum(lengths[index] for index in bin_) for bin_ in bins]
    assert sorted(rooms) == best_fit_decreasing(lengths, token_budget)
    assert bins == pack(lengths, token_budget=token_budget)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 5), st.integers(1, 20))
def test_a_bin_is_within_its_limits_or_holds_one_sequence(
    lengths: list[int], token_budget: int, max_sequences: int, multiple: int
) -> None:
    bins = pack(
        lengths,
        token_budget=token_budget,
        max_sequences=max_sequences,
        pad_to_multiple=multiple,
    )
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    for bin_ in bins:
        size = sum(-(-lengths[index] // multiple) * multiple for index in bin_)
        assert len(bin_) <= max_sequences
        assert size <= token_budget or len(bin_) == 1


@pytest.mark.parametrize("token_budget", [100_000, 10_000_000])
def test_large_rooms_are_as_exact_as_small_ones(token_budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, token_budget // 3, 300).tolist()
    bins = pack(lengths, token_budget=token_budget)
    rooms = [token_budget - sum(lengths[index] for index in bin_) for bin_ in bins]
    assert sorted(rooms) == best_fit_decreasing(lengths, token_budget)


def test_a_sequence_over_the_budget_is_alone() -> None:
    assert pack([3, 99, 3], token_budget=10) == [[1], [0, 2]]
    assert pack([2**63 - 1, 1, 2**63 - 1], token_budget=2**63 - 1) == [[0], [2], [1]]
    assert pack([], token_budget=1) == []


def group_columns(
    groups: list[tuple[int, list[int], int]],
) -> tuple[Column, Column, Column, Column]:
    sizes = [len(responses) for _, responses, _ in groups]
    return (
        int64([prompt for prompt, _, _ in groups]),
        int64([length for _, responses, _ in groups for length in responses]),
        int64([0, *np.cumsum(sizes).tolist()]) if groups else int64([0]),
        int64([teacher for _, _, teacher in groups]),
    )


def naive_layout(groups: list[tuple[int, list[int], int]]) -> tuple[list[int], list[int]]:
    positions, segments = [], []
    for prompt, responses, teacher in groups:
        positions += range(prompt)
        segments += [0] * prompt
        for segment, length in enumerate([*responses, teacher], start=1):
            positions += range(prompt, prompt + length)
            segments += [segment] * length
    return positions, segments


@given(GROUPS, st.integers(1, 80))
def test_whole_groups_are_packed_and_laid_out(
    groups: list[tuple[int, list[int], int]], token_budget: int
) -> None:
    columns = group_columns(groups)
    bins = lists(_core.pack_groups(*columns, token_budget=token_budget))
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(groups)))
    for bin_ in bins:
        chosen = [groups[index] for index in bin_]
        sizes = [prompt + sum(responses) + teacher for prompt, responses, teacher in chosen]
        assert sum(sizes) <= token_budget or len(bin_) == 1
        layout = _core.group_layout(*columns, int64(bin_))
        assert all(column.dtype == np.int32 for column in layout)
        position_ids, segment_ids, cu_seqlens = (column.tolist() for column in layout)
        assert (position_ids, segment_ids) == naive_layout(chosen)
        assert cu_seqlens == [0, *np.cumsum(sizes).tolist()]


@given(st.lists(st.integers(0, 10_000), max_size=150), st.integers(1, 12))
def test_ranks_share_the_work_evenly(lengths: list[int], num_ranks: int) -> None:
    ranks = lists(_core.balance(int64(lengths), num_ranks))
    assert len(ranks) == num_ranks
    assert sorted(index for rank in ranks for index in rank) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in rank) for rank in ranks]
    assert loads == sorted(loads, reverse=True)
    assert max(loads) <= sum(lengths) / num_ranks + max(lengths, default=0)
    assert ranks == lists(_core.balance(int64(lengths), num_ranks))


def imbalance(lengths: NDArray[np.int64], num_ranks: int, **model: float) -> float:
    """By how much the first rank is over its share."""
    cost = model.get("linear", 1.0) * lengths + model.get("quadratic", 0.0) * lengths**2
    first = lists(_core.balance(lengths, num_ranks, **model))[0]
    return cost[first].sum() / (cost.sum() / num_ranks) - 1


@pytest.mark.parametrize("model", [{}, {"quadratic": 1e-4}])
@pytest.mark.parametrize(("count", "num_ranks"), [(1024, 8), (1024, 64), (20_000, 64)])
def test_ranks_of_a_step_differ_by_little(
    count: int, num_ranks: int, model: dict[str, float]
) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.5, 1.0, count), 16, 8192).astype(np.int64)
    # Karmarkar-Karp with 16 long-tailed items a rank is the worst of these.
    assert imbalance(lengths, num_ranks, **model) < (5e-2 if count // num_ranks < 50 else 1e-3)


def test_costs_may_be_given_as_such() -> None:
    assert lists(_core.balance(np.array([0.5, 0.25, 0.25]), 2)) == [[0], [1, 2]]


def test_all_ranks_do_the_same_number_of_micro_batches() -> None:
    ranks = _core.balance(int64([4, 1, 1, 1, 1]), 2)
    schedule = _core.same_count(*ranks)
    assert schedule.dtype == np.int64
    assert schedule.tolist() == [[0, -1, -1, -1], [1, 2, 3, 4]]
    assert _core.same_count(*_core.balance(int64([]), 3)).shape == (3, 0)


ONE = int64([1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([1], token_budget=0), "token_budget must be at least 1, got 0"),
        (lambda: pack([1, -1], token_budget=1), r"lengths\[1\] must be at least 0, got -1"),
        (
            lambda: pack([1], token_budget=1, max_sequences=0),
            "max_sequences must be at least 1, got 0",
        ),
        (
            lambda: pack([1], token_budget=1, pad_to_multiple=-8),
            "pad_to_multiple must be at least 1, got -8",
        ),
        (
            lambda: _core.pack_groups(ONE, ONE, int64([0, 1]), int64([]), token_budget=1),
            "teacher_lengths must have one entry for each group, 1, got 0",
        ),
        (
            lambda: _core.pack_groups(ONE, ONE, int64([0]), ONE, token_budget=1),
            "group_offsets must have one entry more than the 1 groups, got 1",
        ),
        (
            lambda: _core.pack_groups(ONE, ONE, int64([0, 2]), ONE, token_budget=1),
            r"group_offsets\[1\] is 2, .* number of rollouts, 1",
        ),
        (
            lambda: _core.group_layout(ONE, ONE, int64([0, 1]), ONE, int64([1])),
            r"group_indices\[0\] must be at least 0 and below 1, got 1",
        ),
        (
            lambda: _core.group_layout(int64([2**62]), ONE, int64([0, 1]), ONE, int64([0])),
            "do not fit one forward pass",
        ),
        (lambda: _core.balance(ONE, 0), "num_ranks must be at least 1, got 0"),
        (lambda: _core.balance(ONE, 2**40), "num_ranks must be at most 1048576"),
        (lambda: _core.balance(int64([-1]), 2), r"costs_or_lengths\[0\] must be at least 0"),
        (lambda: _core.balance(np.array([np.nan]), 2), r"costs_or_lengths\[0\] .* finite cost"),
        (lambda: _core.balance(ONE, 2, linear=-1.0), "linear must be a finite number"),
        (lambda: _core.balance(ONE, 2, quadratic=np.inf), "quadratic must be a finite number"),
        (lambda: _core.same_count(ONE, int64([])), "offsets must hold at least the 0"),
        (lambda: _core.same_count(ONE, int64([0, 5])), r"offsets\[1\] is 5"),
        (lambda: _core.same_count(int64([-1]), int64([0, 1])), r"indices\[0\] must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_arrays_of_other_types_are_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"costs_or_lengths must be .* int64 or float64, got .*list"
    ):
        _core.balance([1, 2], 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="float32"):
        _core.pack_sequences(np.ones(2, np.float32), token_budget=1)  # pyright: ignore[reportArgumentType]
