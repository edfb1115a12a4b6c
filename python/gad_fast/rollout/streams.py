"""A random stream for each rollout: its tokens do not depend on what is sampled beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, group_id: int, rollout_index: int) -> int:
    """What tells the stream of a rollout from all others."""
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, group_id, rollout_index):
        key = _mixed(key ^ np.uint64(part % 2**64))
    return int(key[0])


def uniforms(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number `counters` of each stream, in [0, 1) with 53 bits.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), whose n-th number needs none before it.
    """
    numbers = _mixed(keys + counters.astype(np.uint64) * _GOLDEN)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
