"""The CPU paths of the kernels against naive autograd over whole logits: time and peak memory.

Question: is the path that a laptop takes at least as fast as what one would write by hand, in a
third of its memory? Every measurement has a process of its own, turn by turn, so that none warms
another's caches or allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gad_fast.bench.kernel_cases import CASES, Shapes
from gad_fast.bench.report import Comparison, Of, Report
from gad_fast.bench.timing import seconds
from gad_fast.errors import ConfigError

# SmolLM2-135M's head, and a micro-batch of the quickstart.
SHAPES = (1024, 576, 49152)
QUICK_SHAPES = (64, 32, 2048)
TINY = (8, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATUS = Path("/proc/self/status")

FIGURES: tuple[tuple[Of, str], ...] = (("time", "seconds"), ("memory", "peak_bytes"))

Turns = list[dict[str, dict[str, float]]]
"""Seconds and bytes of every case, turn by turn."""


def run(*, quick: bool) -> Report:
    """Measures every case in turns, each in a child process.

    Raises:
        ConfigError: this is not Linux, which alone tells a process its peak of memory.
    """
    if not STATUS.exists():
        raise ConfigError("bench kernels reads peak memory from /proc, which only Linux has")
    shapes, repeats = (QUICK_SHAPES, 1) if quick else (SHAPES, 5)
    threads = torch.get_num_threads()
    turns: dict[str, Turns] = {
        dtype: [
            {name: _measure_in_child(name, dtype, shapes, threads) for name in CASES}
            for _ in range(repeats)
        ]
        for dtype in DTYPES
    }
    return Report(
        name="kernels",
        is_quick=quick,
        question="Is a laptop's path as fast as what one writes by hand, in less memory?",
        settings={**dict(zip("TDV", shapes, strict=True)), "num_threads": threads},
        comparisons=[row for dtype in DTYPES for row in _comparisons(dtype, turns[dtype])],
        samples=turns,
    )


def measure(name: str, dtype: str, shapes: Shapes, threads: int) -> dict[str, float]:
    """Best of three runs after a first one, and the memory that the runs added at their peak.

    To be called in a process that has run nothing else.
    """
    torch.set_num_threads(threads)
    make, _ = CASES[name]
    # What torch loads when an operation first runs is not the operation's.
    make(DTYPES[dtype], TINY)()
    call = make(DTYPES[dtype], shapes)
    before = _resident_bytes("VmRSS")
    call()
    peak = _resident_bytes("VmHWM") - before
    return {"seconds": min(seconds(call) for _ in range(3)), "peak_bytes": float(max(peak, 1))}


def _measure_in_child(name: str, dtype: str, shapes: Shapes, threads: int) -> dict[str, float]:
    words = json.dumps([name, dtype, shapes, threads])
    command = [sys.executable, "-P", "-m", "gad_fast.bench.kernels", words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _comparisons(dtype: str, turns: Turns) -> list[Comparison]:
    return [
        Comparison(
            case=f"{name}, {dtype}",
            peer="naive",
            of=what,
            ratios=[turn[name][figure] / turn[peer][figure] for turn in turns],
        )
        for name, (_, peer) in CASES.items()
        if name != peer
        for what, figure in FIGURES
    ]


def _resident_bytes(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def _answer(words: str) -> Any:
    name, dtype, shapes, threads = json.loads(words)
    return measure(name, dtype, tuple(shapes), threads)


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1])))  # noqa: T201
