"""The CPU paths of the kernels against naive autograd over whole logits: time and peak memory.

Question: is the path that a laptop takes at least as fast as what one would write by hand, in a
third of its memory? Both run in this process's children, one measurement a child, turn by turn, so
that neither warms the other's caches or allocator.

    python benchmarks/cpu_kernels.py [--output benchmarks/results/cpu-kernels.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gad_fast import kernels

# SmolLM2-135M's head, and a micro-batch of the quickstart.
SHAPES = (1024, 576, 49152)
TINY = (8, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS = 5


Shapes = tuple[int, int, int]
"""T tokens, D width, V vocabulary."""
Case = Callable[[torch.dtype, Shapes], Callable[[], None]]


def inputs(dtype: torch.dtype, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and advantages."""
    torch.manual_seed(0)
    T, D, V = shapes
    hidden = torch.randn(T, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (T,)), torch.randn(T)


def naive_loss(logits: Tensor, labels: Tensor, advantages: Tensor) -> Tensor:
    """What one writes by hand, and what TRL and verl do without a fused kernel."""
    logprobs = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return -(advantages * (logprobs - logprobs.detach()).exp()).mean()


def naive_from_hidden(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Head and loss, whole logits."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        loss = naive_loss(hidden @ weight.t(), labels, advantages)
        torch.autograd.grad(loss, [hidden, weight])

    return run


def linear_policy_loss(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Gradient in the forward pass."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        loss, _ = kernels.linear_policy_loss(hidden, weight, labels, None, advantages)
        torch.autograd.grad(loss, [hidden, weight])

    return run


def linear_token_logprobs(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Logits made again in the backward pass."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        logprobs = kernels.linear_token_logprobs(hidden, weight, labels)
        torch.autograd.grad(-(advantages * logprobs).mean(), [hidden, weight])

    return run


def _logits(dtype: torch.dtype, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, advantages = inputs(dtype, shapes)
    return (hidden @ weight.t()).detach().requires_grad_(), labels, advantages


def naive_from_logits(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """The loss alone, by hand."""
    logits, labels, advantages = _logits(dtype, shapes)
    return lambda: _discard(torch.autograd.grad(naive_loss(logits, labels, advantages), logits))


def policy_loss_from_logits(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """The loss alone, one pass."""
    logits, labels, advantages = _logits(dtype, shapes)

    def run() -> None:
        loss, _ = kernels.policy_loss_from_logits(logits, labels, None, advantages)
        torch.autograd.grad(loss, logits)

    return run


def token_logprobs(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Log-probabilities, and a loss on them."""
    logits, labels, advantages = _logits(dtype, shapes)

    def run() -> None:
        logprobs = kernels.token_logprobs(logits, labels)
        torch.autograd.grad(-(advantages * logprobs).mean(), logits)

    return run


def _discard(_: object) -> None:
    return None


# What is measured, and what it is measured against.
CASES: dict[str, tuple[Case, str]] = {
    "naive_from_hidden": (naive_from_hidden, "naive_from_hidden"),
    "linear_policy_loss": (linear_policy_loss, "naive_from_hidden"),
    "linear_token_logprobs": (linear_token_logprobs, "naive_from_hidden"),
    "naive_from_logits": (naive_from_logits, "naive_from_logits"),
    "policy_loss_from_logits": (policy_loss_from_logits, "naive_from_logits"),
    "token_logprobs": (token_logprobs, "naive_from_logits"),
}


def measure_here(name: str, dtype: str, threads: int) -> dict[str, float]:
    """Best of three runs after a first one, and the memory that the runs added at their peak."""
    torch.set_num_threads(threads)
    # What torch loads when an operation first runs is not the operation's.
    CASES[name][0](DTYPES[dtype], TINY)()
    run = CASES[name][0](DTYPES[dtype], SHAPES)
    before = _resident_bytes("VmRSS")
    run()
    peak = _resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_bytes": float(max(peak, 0))}


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, dtype: str, threads: int) -> dict[str, float]:
    """`measure_here`, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, dtype, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def compare(dtype: str, threads: int) -> dict[str, dict[str, Any]]:
    """Medians over the repeats, ratios to the naive version of the same turn, and all samples."""
    turns = [{name: measure(name, dtype, threads) for name in CASES} for _ in range(REPEATS)]
    return {
        name: {
            "seconds": statistics.median(turn[name]["seconds"] for turn in turns),
            "peak_mib": statistics.median(turn[name]["peak_bytes"] for turn in turns) / 2**20,
            "time_ratio": statistics.median(
                turn[name]["seconds"] / turn[peer]["seconds"] for turn in turns
            ),
            "memory_ratio": statistics.median(
                turn[name]["peak_bytes"] / turn[peer]["peak_bytes"] for turn in turns
            ),
            "samples": [turn[name] for turn in turns],
        }
        for name, (_, peer) in CASES.items()
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line for line in lines if line.startswith("model name")).split(": ")[1]


def main() -> None:
    """Print a table of ratios; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", nargs=2, metavar=("CASE", "DTYPE"))
    arguments = parser.parse_args()
    if arguments.child:
        name, dtype = arguments.child
        print(json.dumps(measure_here(name, dtype, arguments.threads)))
        return
    results = {dtype: compare(dtype, arguments.threads) for dtype in DTYPES}
    for dtype, figures in results.items():
        for name, figure in figures.items():
            print(
                f"{dtype:9} {name:24} time x{figure['time_ratio']:.2f}  "
                f"memory x{figure['memory_ratio']:.2f}  ({figure['peak_mib']:.0f} MiB)"
            )
    if arguments.output:
        record = {
            "shapes": dict(zip("TDV", SHAPES, strict=True)),
            "threads": arguments.threads,
            "processor": _processor(),
            "triton": version("triton"),
            "torch": torch.__version__,
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
