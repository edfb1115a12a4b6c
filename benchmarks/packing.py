"""Best-fit decreasing of a million lengths: the Rust core against plain Python with a segment tree.

Question: is packing a whole data set a matter of a tenth of a second, with the fill that the usual
method has? The peer is our own plain version of what TRL packs with: a segment tree over the room
that is left finds the tightest bin. Both run in turns in this process and must give the same bins.

    python benchmarks/packing.py [--smoke] [--output benchmarks/results/packing.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gad_fast import _core

TOKEN_BUDGET = 16_384
GOAL = 25.0
SEED = 0


def lengths(count: int) -> NDArray[np.int64]:
    """Lengths as of chats: lognormal, from 16 to 8,192."""
    values = np.random.default_rng(SEED).lognormal(6.5, 1.0, count)
    return np.clip(values, 16, 8192).astype(np.int64)


class SegmentTree:
    """The least room of at least some size that a bin has left.

    Leaf r holds r if there is a bin with this room, else 0; a node holds the larger of its two.
    """

    def __init__(self, budget: int) -> None:
        self.size = 1 << budget.bit_length()
        self.tree = [0] * (2 * self.size)

    def set(self, room: int, value: int) -> None:
        """Marks a room as there or as gone."""
        tree, place = self.tree, self.size + room
        tree[place] = value
        while place > 1:
            place >>= 1
            left, right = tree[2 * place], tree[2 * place + 1]
            tree[place] = left if left >= right else right

    def at_least(self, size: int) -> int:
        """The least room of at least `size` >= 1; 0 if there is none.

        A room beside the path from the leaf of `size` to the root is larger; the lowest one is the
        tightest, and under it the leftmost.
        """
        tree, place = self.tree, self.size + size
        if tree[place] >= size:
            return tree[place]
        while place > 1:
            if place % 2 == 0 and tree[place + 1] >= size:
                place += 1
                break
            place >>= 1
        else:
            return 0
        while place < self.size:
            place *= 2
            if tree[place] < size:
                place += 1
        return tree[place]


def pack_in_python(sizes: list[int], token_budget: int) -> list[list[int]]:
    """Best-fit decreasing with lists; the indices of each bin."""
    tree = SegmentTree(token_budget)
    stacks: dict[int, list[int]] = {}  # bins by the room that is left
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        room = tree.at_least(size)
        if room == 0:
            room, place = token_budget, len(bins)
            bins.append([index])
        else:
            stack = stacks[room]
            place = stack.pop()
            bins[place].append(index)
            if not stack:
                tree.set(room, 0)
        rest = room - size
        if rest > 0:
            stack = stacks.setdefault(rest, [])
            if not stack:
                tree.set(rest, rest)
            stack.append(place)
    return bins


def check_equal(values: NDArray[np.int64]) -> dict[str, float]:
    """Fails unless both give the very same bins; gives their number, the bound and the fill."""
    indices, offsets = _core.pack_sequences(values, token_budget=TOKEN_BUDGET)
    expected = pack_in_python(values.tolist(), TOKEN_BUDGET)
    found = [part.tolist() for part in np.split(indices, offsets[1:-1])]
    assert found == expected, (len(found), len(expected))
    least = -(-int(values.sum()) // TOKEN_BUDGET)
    fill = float(values.sum()) / (len(found) * TOKEN_BUDGET)
    return {"num_bins": len(found), "least_possible": least, "fill": fill}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(values: NDArray[np.int64], repeats: int) -> dict[str, Any]:
    """Samples of both in turns, and the ratio of each turn."""
    as_list = values.tolist()
    turns = []
    for _ in range(repeats):
        ours = seconds(lambda: _core.pack_sequences(values, token_budget=TOKEN_BUDGET))
        peer = seconds(lambda: pack_in_python(as_list, TOKEN_BUDGET))
        turns.append({"ours_seconds": ours, "peer_seconds": peer, "ratio": peer / ours})
    return {"ratio": statistics.median(turn["ratio"] for turn in turns), "samples": turns}


def main() -> None:
    """Print fill and ratio; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="20,000 lengths, once")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    count, repeats = (20_000, 1) if arguments.smoke else (arguments.count, arguments.repeats)
    values = lengths(count)
    fill = check_equal(values)  # also the warm-up
    figures = compare(values, repeats)
    ratios = [sample["ratio"] for sample in figures["samples"]]
    print(
        f"{count} lengths, {fill['num_bins']} bins (at least {fill['least_possible']}), "
        f"fill {fill['fill']:.4f}, the same bins in both\n"
        f"x{figures['ratio']:.1f} of plain Python (x{min(ratios):.1f} to x{max(ratios):.1f}), "
        f"goal x{GOAL:.0f}"
    )
    if arguments.output:
        record = {
            "count": count,
            "token_budget": TOKEN_BUDGET,
            "seed": SEED,
            "goal": GOAL,
            "processor": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            **fill,
            **figures,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
