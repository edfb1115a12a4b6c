"""Runs in processes of their own, to be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gad_fast import Recipe, train
from gad_fast.errors import GadFastError

# A server that has imported torch forks each run: an import takes longer than a tiny run. It must
# not have used torch or the core, whose threads would be missing in a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["gad_fast.training", "transformers.models.llama.modeling_llama", "rouge_score.rouge_scorer"]
)


def start(recipe: Recipe) -> ForkServerProcess:
    """A process that trains; its exit code is that of the command."""
    process = _CONTEXT.Process(target=_train, args=(recipe.model_dump_json(),))
    process.start()
    return process


def run(recipe: Recipe) -> int:
    """Trains to the end in a process; returns its exit code."""
    process = start(recipe)
    process.join(timeout=100)
    assert process.exitcode is not None
    return process.exitcode


def kill_when(process: ForkServerProcess, path: Path, num_lines: int, delay: float) -> bool:
    """Kills `delay` seconds after a file has so many lines; False if the process ended first."""
    while process.is_alive() and lines(path) < num_lines:
        time.sleep(0.002)
    process.join(timeout=delay)
    if not process.is_alive():
        return False
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def lines(path: Path) -> int:
    """Whole lines in a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outcome(run_folder: Path) -> dict[str, Any]:
    """All that must not depend on whether a run was cut off: records without times, tensors."""
    tensors = {
        f"{path.relative_to(run_folder)}:{name}": tensor
        for path in sorted(run_folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return {
        "metrics": [_timeless(line) for line in records(run_folder / "metrics.jsonl")],
        "samples": records(run_folder / "samples.jsonl"),
        "summary": json.loads((run_folder / "summary.json").read_text()),
        "tensors": tensors,
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two outcomes are equal bit for bit."""
    assert first["metrics"] == second["metrics"]
    assert first["samples"] == second["samples"]
    assert first["summary"] == second["summary"]
    assert first["tensors"].keys() == second["tensors"].keys()
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none when it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    is_time = ("_seconds", "_per_second")
    return {key: value for key, value in line.items() if not key.endswith(is_time)}


def _train(recipe: str) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            train(Recipe.model_validate_json(recipe))
        except GadFastError:
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
