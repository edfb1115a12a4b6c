"""Time and memory of a callable on a device.

On a GPU, device events around the call, after warm-up and with a cold cache: a buffer larger than
the cache is written before each repeat, which also keeps the device busy while the call's launches
are queued, so that short calls are not timed by the host. On a CPU, the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpu_suite.scale import Scale

_WARM_UPS = 2
_MIN_REPEATS = 3
_MAX_REPEATS = 50
_GIB = 2**30


class Measurement(NamedTuple):
    """What a call costs."""

    milliseconds: float
    """Median."""
    spread: float
    """Slowest over fastest third of the repeats: what is below it is noise."""
    peak_gib: float | None
    """Memory above what was allocated before the call; None on a CPU."""


def measure(run: Callable[[], object], scale: Scale) -> Measurement:
    """Times `run` for about `scale.seconds_per_timing`, at least three times."""
    for _ in range(_WARM_UPS - 1):
        run()
    peak = peak_gib(run, scale.device)
    flush = torch.empty(scale.flush_mib << 20, dtype=torch.int8, device=scale.device)
    time_once = _time_on_device if scale.device == "cuda" else _time_on_host
    times: list[float] = []
    until = time.perf_counter() + scale.seconds_per_timing
    while len(times) < _MIN_REPEATS or (time.perf_counter() < until and len(times) < _MAX_REPEATS):
        flush.zero_()
        times.append(time_once(run))
    times.sort()
    third = max(1, len(times) // 3)
    spread = statistics.mean(times[-third:]) / statistics.mean(times[:third])
    return Measurement(statistics.median(times), spread, peak)


def synchronize(device: str) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gib(run: Callable[[], object], device: str) -> float | None:
    """Most memory that `run` holds above what is held before it; its result dies with it."""
    if device != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _GIB


def _time_on_device(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_on_host(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
