"""Best-fit decreasing of a million lengths: the Rust core against plain Python and TRL.

Question: is packing a whole data set a matter of a tenth of a second, with the fill that the usual
method has? The first peer is a plain version of what TRL packs with, a segment tree over the room
that is left, and must give the same bins. The second, where it is installed, is TRL's own
`pack_dataset`: it moves the tokens too, so that both do, for a part of the lengths.
"""

from __future__ import annotations

from importlib.util import find_spec

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray

from gad_fast import _core
from gad_fast.bench.plain_packing import pack_in_python
from gad_fast.bench.report import Comparison, Report
from gad_fast.bench.timing import seconds

TOKEN_BUDGET = 16_384
GOAL = 25.0
SEED = 0
# One in so many lengths, for TRL: the tokens of a million are a gigabyte.
TRL_PART = 20

Turns = list[dict[str, float]]


def run(*, quick: bool) -> Report:
    """Packs with all sides in turns; fails unless they agree on the bins."""
    count, repeats = (20_000, 1) if quick else (1_000_000, 5)
    values = lengths(count)
    fill = check_equal(values)  # also the warm-up
    turns = compare(values, repeats)
    case = f"{count:,} lengths, {fill['fill']:.2%} full"
    comparisons = [_comparison(case, "plain Python, same bins", turns, GOAL)]
    remarks: list[str] = []
    trl_turns: Turns = []
    if find_spec("trl"):
        trl_turns = compare_with_trl(values[: count // TRL_PART], repeats)
        case = f"{count // TRL_PART:,} lengths and their tokens"
        comparisons.append(_comparison(case, "TRL pack_dataset", trl_turns, None))
    else:
        remarks.append("TRL is not installed, and left out (pip install trl)")
    return Report(
        name="packing",
        is_quick=quick,
        question="How fast are a million lengths packed, and as tight as the usual method does?",
        settings={"count": count, "token_budget": TOKEN_BUDGET, "seed": SEED, **fill},
        comparisons=comparisons,
        samples={"plain": turns, "trl": trl_turns},
        remarks=remarks,
    )


def lengths(count: int) -> NDArray[np.int64]:
    """Lengths as of chats: lognormal, from 16 to 8,192."""
    values = np.random.default_rng(SEED).lognormal(6.5, 1.0, count)
    return np.clip(values, 16, 8192).astype(np.int64)


def check_equal(values: NDArray[np.int64]) -> dict[str, float]:
    """Fails unless both give the very same bins; gives their number, the bound and the fill."""
    indices, offsets = _core.pack_sequences(values, token_budget=TOKEN_BUDGET)
    expected = pack_in_python(values.tolist(), TOKEN_BUDGET)
    found = [part.tolist() for part in np.split(indices, offsets[1:-1])]
    assert found == expected, (len(found), len(expected))
    least = -(-int(values.sum()) // TOKEN_BUDGET)
    fill = float(values.sum()) / (len(found) * TOKEN_BUDGET)
    return {"num_bins": len(found), "least_possible": least, "fill": fill}


def compare(values: NDArray[np.int64], repeats: int) -> Turns:
    """Seconds of both, turn by turn."""
    as_list = values.tolist()
    return [
        {
            "ours": seconds(lambda: _core.pack_sequences(values, token_budget=TOKEN_BUDGET)),
            "peer": seconds(lambda: pack_in_python(as_list, TOKEN_BUDGET)),
        }
        for _ in range(repeats)
    ]


def compare_with_trl(values: NDArray[np.int64], repeats: int) -> Turns:
    """Seconds of both with their tokens moved, turn by turn; fails unless the bins are as many."""
    from trl.data_utils import pack_dataset

    offsets = np.concatenate([[0], values.cumsum()])
    tokens = pyarrow.array(np.zeros(offsets[-1], dtype=np.int8))
    column = pyarrow.LargeListArray.from_arrays(offsets, tokens)
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column}))
    options = {"batch_size": len(values)}  # else it packs each thousand on its own

    def by_trl() -> int:
        return len(pack_dataset(dataset, TOKEN_BUDGET, map_kwargs=options))

    def by_core() -> int:
        indices, bin_offsets = _core.pack_sequences(values, token_budget=TOKEN_BUDGET)
        column.take(pyarrow.array(indices))
        return len(bin_offsets) - 1

    datasets.disable_progress_bars()
    found, expected = by_core(), by_trl()  # also the warm-up
    assert found == expected, (found, expected)
    return [{"ours": seconds(by_core), "peer": seconds(by_trl)} for _ in range(repeats)]


def _comparison(case: str, peer: str, turns: Turns, goal: float | None) -> Comparison:
    ratios = [turn["peer"] / turn["ours"] for turn in turns]
    return Comparison(case, peer, ratios, goal=goal)
