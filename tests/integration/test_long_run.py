"""Nothing piles up in a long run: memory, file handles, threads; and no step is missing."""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import crash
import tiny
from gad_fast import train
from gad_fast.run.recorder import Recorder

NUM_STEPS = int(os.environ.get("GAD_FAST_LONG_STEPS", "60"))
"""`make long-run` has 500."""
SETTLED = NUM_STEPS // 3
"""Until then caches fill."""


class Usage(NamedTuple):
    resident_bytes: int
    num_files: int
    num_threads: int


def usage() -> Usage:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    num_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing is itself a handle
    return Usage(pages * os.sysconf("SC_PAGE_SIZE"), num_files, threading.active_count())


@pytest.mark.timeout(1200)
def test_a_long_run_uses_no_more_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint, a validation and a journal all along."""
    used: list[Usage] = []
    end_step = Recorder.end_step

    def measuring(self: Recorder, *arguments: Any, **options: Any) -> None:
        end_step(self, *arguments, **options)
        self.wait()
        used.append(usage())

    monkeypatch.setattr(Recorder, "end_step", measuring)
    often = {"checkpoint_every_steps": 5, "validate_every": 10}
    stages = {"warmup": {"steps": NUM_STEPS // 2}, "game": {"steps": NUM_STEPS // 2}}
    # A rate that keeps rollouts alike in length, so that steps are alike in what they need.
    slow = {"student": {"peak": 1e-6}, "discriminator": {"peak": 1e-6}}
    sections = {name: {**stage, **slow} for name, stage in stages.items()}
    train(tiny.recipe(tmp_path, run=often, **sections))
    settled = used[NUM_STEPS // 2 + SETTLED // 2 :]  # past the making of the reference
    half = len(settled) // 2
    before = max(each.resident_bytes for each in settled[:half])
    after = max(each.resident_bytes for each in settled[half:])
    assert after <= 1.02 * before
    assert len({(each.num_files, each.num_threads) for each in settled}) == 1
    lines = crash.records(tmp_path / "run/metrics.jsonl")
    steps = [line["step"] for line in lines if "step_seconds" in line]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert len([line for line in lines if line["stage"] == "validation"]) == NUM_STEPS // 10 + 1
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    assert not (tmp_path / "run/journal").exists()
