"""A step of the game, here and on TRL's GRPOTrainer.

Question: how much faster, and in how much less memory, is a step than what a user would build
instead? Each measurement is a process of its own, turn by turn, so that neither side warms the
other's caches or allocator. Needs `pip install -e '.[bench]'` and the quickstart's student.
`gad-fast bench step` has what each saving of the trainer's part is worth.

    python benchmarks/step.py MODEL [--size 4x4x64] [--dtype float32] [--turns 3] [--steps 2]
                              [--sides here ...] [--output benchmarks/results/FILE.json]

A side named "a group at a time" has micro-batches of one group; the others take a step of 4x4x64 at
once, as TRL does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from step_cost import here
from step_cost.work import SIZES, Cost

DTYPES = ("float32", "bfloat16")
PEER = "TRL"

Sample = dict[str, Any]


def measure_here(arguments: argparse.Namespace) -> Cost:
    """One side's cost, in this process."""
    torch.set_num_threads(arguments.threads)
    size, dtype, side = SIZES[arguments.size], arguments.dtype, arguments.child
    num_steps = 1 + arguments.steps  # what is done once is in the first, which is not counted
    with tempfile.TemporaryDirectory() as folder:
        if side == PEER:
            # Imported here: the package must not pay for TRL's imports in its own process.
            from step_cost import on_trl

            return on_trl.run(arguments.model, size, dtype, num_steps, Path(folder))
        return here.run(arguments.model, size, dtype, num_steps, Path(folder), side)


def measure(side: str, arguments: argparse.Namespace) -> Sample:
    """`measure_here`, in a process of its own."""
    words = [arguments.model, "--child", side, "--size", arguments.size]
    options = ["--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    options += ["--steps", str(arguments.steps)]
    command = [sys.executable, __file__, *words, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of each side over the turns, ratios to the peer of the same turn, and all samples."""
    sides = (*arguments.sides, PEER)
    turns = [{side: measure(side, arguments) for side in sides} for _ in range(arguments.turns)]
    return {side: _figures([turn[side] for turn in turns], [turn[PEER] for turn in turns])
            for side in sides}  # fmt: skip


def _figures(own: list[Sample], peers: list[Sample]) -> dict[str, Any]:
    def median_ratio(figure: Any) -> float:
        return statistics.median(
            figure(sample) / figure(peer) for sample, peer in zip(own, peers, strict=True)
        )

    return {
        "speed_ratio": median_ratio(_tokens_per_second),
        "memory_ratio": median_ratio(lambda sample: sample["peak_gib"]),
        "tokens_per_second": statistics.median(map(_tokens_per_second, own)),
        "peak_gib": statistics.median(sample["peak_gib"] for sample in own),
        "seconds": {
            phase: statistics.median(sample["seconds"][phase] for sample in own)
            for phase in own[0]["seconds"]
        },
        "samples": own,
    }


def _tokens_per_second(sample: Sample) -> float:
    return sample["tokens"] / sample["seconds"]["step"]


def show(dtype: str, figures: dict[str, Any]) -> None:
    """A line a side."""
    for side, figure in figures.items():
        phases = "  ".join(f"{name} {s:.2f}" for name, s in figure["seconds"].items())
        print(
            f"{dtype:9} {side:29} {figure['speed_ratio']:.2f}x of {PEER}  memory "
            f"x{figure['memory_ratio']:.2f} ({figure['peak_gib']:.2f} GiB)  seconds: {phases}",
            flush=True,
        )


def record(arguments: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """What the result file holds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line for line in lines if line.startswith("model name")).split(": ")[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, check=False, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    return {
        "size": asdict(SIZES[arguments.size]),
        "model": Path(arguments.model).name,
        "steps": arguments.steps,
        "turns": arguments.turns,
        "threads": arguments.threads,
        "processor": processor,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "results": results,
    }


def main() -> None:
    """Print ratios; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the student")
    parser.add_argument("--size", choices=SIZES, default="4x4x64")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="after a first one")
    parser.add_argument("--sides", nargs="+", choices=here.WAYS, default=here.WAYS, metavar="SIDE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help="measure one side, here")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(asdict(measure_here(arguments))))
        return
    results = {}
    for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
        arguments.dtype = dtype
        results[dtype] = compare(arguments)
        show(dtype, results[dtype])
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record(arguments, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
