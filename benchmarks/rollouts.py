"""`gad-fast bench rollouts` on the student of the quickstart, at both sizes of the project's goal.

    python benchmarks/rollouts.py [--output benchmarks/results/rollouts.json] [--turns 3]

vLLM over HTTP is one more peer, in the dtype that it serves; its CPU build, with as many threads:

    VLLM_CPU_OMP_THREADS_BIND=0-1 vllm serve models/SmolLM2-135M-Instruct --dtype float32
    python benchmarks/rollouts.py --dtypes float32 --server http://localhost:8000/v1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from gad_fast.bench import report, rollouts
from gad_fast.bench.rollouts import DTYPES, SHAPE, Shape

STUDENT = Path("models/SmolLM2-135M-Instruct")
SHAPES = {str(shape): shape for shape in (SHAPE, Shape(16, 8, 256))}


def main() -> None:
    """Print ratios and limits; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--server", metavar="URL", help="of a completions endpoint, as vLLM's")
    arguments = parser.parse_args()
    if arguments.output is not None:
        report.check_output(arguments.output)
    torch.set_num_threads(arguments.threads)
    found = rollouts.run(
        STUDENT,
        quick=False,
        shapes=[SHAPES[name] for name in arguments.shapes],
        dtypes=arguments.dtypes,
        num_turns=arguments.turns,
        server=arguments.server,
    )
    report.show(found, Console(highlight=False))
    if arguments.output is not None:
        report.write(found, arguments.output)


if __name__ == "__main__":
    main()
