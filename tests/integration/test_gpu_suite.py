"""The GPU suite at the sizes of its smoke run, and what it does when a part of it breaks."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from gad_fast.config import HardwareSettings
from gad_fast.models.loading import Precision
from gpu_suite.ceilings import Ceilings, ceilings_of
from gpu_suite.data import Tokens, make_problem
from gpu_suite.operations import Pair, plain_logprobs
from gpu_suite.random_models import random_model
from gpu_suite.rollouts import floor_bytes
from gpu_suite.sanitizer import verdict
from gpu_suite.scale import SMOKE, Shape
from gpu_suite.supervisor import Child, Section, run_section
from gpu_suite.truth import distances

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu_suite.py"
SECTIONS = (
    "environment",
    "ceilings",
    "correctness",
    "sanitizer",
    "kernels",
    "peers",
    "step",
    "rollouts",
)
OPERATIONS = {
    "token_logprobs",
    "entropy_from_logits",
    "policy_loss",
    "policy_loss_from_logits",
    "linear_token_logprobs",
    "linear_policy_loss",
    "group_advantages",
    "last_token_score",
    "bradley_terry_loss",
}


# Eight processes, each with its own import of torch.
@pytest.mark.timeout(300)
def test_smoke_run_finishes_every_section_and_finds_nothing_wrong(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(output.read_text())["sections"]
    assert tuple(sections) == SECTIONS
    for name, section in sections.items():
        allowed = {"ok", "unavailable"} if name == "peers" else {"ok"}
        assert {case["status"] for case in section["cases"]} <= allowed, name
    checked = {row["op"] for row in rows(sections["correctness"])}
    assert checked >= OPERATIONS
    assert {row["op"] for row in rows(sections["kernels"])} >= OPERATIONS
    trainer = {"discriminator", "student"}
    papers = {f"{phase}, paper's passes" for phase in trainer}
    for model in ("tiny", "tiny, LoRA"):
        found = {row["phase"]: row for row in rows(sections["step"]) if row["model"] == model}
        assert found.keys() == trainer | papers | {"rollout", "step"}
        assert all(found[phase]["mfu"] > 0 for phase in trainer | papers)
    sampled = {row["engine"]: row["tokens"] for row in rows(sections["rollouts"])}
    assert sampled.keys() == {"static", "continuous", "reference"}
    assert all(24 < tokens <= 32 for tokens in sampled.values())
    assert done.stdout.splitlines()[-1].endswith(str(output))


def rows(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for case in section["cases"] for row in case["rows"]]


def test_a_decode_steps_floor_is_the_bytes_of_weights_keys_and_values():
    """4 rows of 6 and half of 8 tokens; 2 layers of one head of 8 keys and 8 values, float32."""
    (size,) = SMOKE.rollouts
    cpu = Precision(HardwareSettings(device="cpu"))
    model = random_model(Qwen2ForCausalLM, size.model, cpu, 14)
    embedding, norms = 64 * 16, 5 * 16
    attention = 2 * 16 * 16 + 16 + 2 * (8 * 16 + 8)
    weights = embedding + norms + 2 * (attention + 3 * 16 * 24)
    assert floor_bytes(model, size) == 4 * (weights + 4 * 10 * 2 * 2 * 8)


# A child of three cases: `second` dies the first time it is met, as after an illegal access.
DYING = """
import json, os, sys
task = json.loads(sys.argv[1])
def write(**line):
    with open(task["stream"], "a") as stream:
        stream.write(json.dumps(line) + "\\n")
names = [name for name in ("first", "second", "third") if name not in task["done"]]
for name in names:
    write(name=name, status="planned", is_optional=False)
for name in names:
    write(name=name, status="started")
    if name == "second":
        print("an illegal access")
        sys.stdout.flush()
        os._exit(3)
    write(name=name, status="ok", rows=[{"done": task["done"]}])
write(name="", status="end")
"""


def run_child(source: str, *, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
    child = Child([sys.executable, "-c", source], {})
    found = run_section(Section("any", 0), "smoke", {}, child, until=time.time() + seconds)
    return {case["name"]: case for case in found["cases"]}


def test_case_that_kills_its_process_costs_no_other_case():
    cases = run_child(DYING)
    assert [case["status"] for case in cases.values()] == ["ok", "failed", "ok"]
    assert cases["second"]["reason"] == "an illegal access"
    assert cases["third"]["rows"] == [{"done": ["first", "second"]}]


def test_process_that_cannot_start_is_a_failure_with_its_last_line():
    cases = run_child("raise SystemExit('no torch')")
    assert [case["status"] for case in cases.values()] == ["failed"]
    assert cases["start"]["reason"] == "no torch"


def test_case_that_hangs_is_ended_and_fails():
    # The grace is 15 s.
    hanging = DYING.replace("os._exit(3)", "import time; time.sleep(600)")
    start = time.monotonic()
    cases = run_child(hanging, seconds=-14.0)
    assert time.monotonic() - start < 30
    assert [case["status"] for case in cases.values()] == ["ok", "failed", "skipped"]
    assert cases["second"]["reason"] == "did not end in time"


@pytest.mark.parametrize(
    ("output", "code", "passes"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= ERROR SUMMARY: 2 errors", 0, False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 0, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),
        ("========= Device not supported", 0, False),
    ],
)
def test_sanitizer_passes_only_where_it_ended_and_found_nothing(output, code, passes):
    assert verdict(output, code)["passes"] is passes


def test_floor_is_the_larger_of_bytes_and_arithmetic():
    ceilings = Ceilings(gb_per_second=1000.0, tflop_per_second=100.0, is_measured=True)
    assert ceilings.milliseconds(num_bytes=2e9) == pytest.approx(2.0)
    assert ceilings.milliseconds(flop=3e11) == pytest.approx(3.0)
    assert ceilings.milliseconds(num_bytes=2e9, flop=3e11) == pytest.approx(3.0)


def test_floors_of_a_run_without_ceilings_say_that_they_are_nominal():
    assert not ceilings_of({"sections": {}}).is_measured


def plain_but(factor: float) -> Pair:
    """An operation that is off by a factor in its last row."""

    def ours(x: torch.Tensor, weight: torch.Tensor | None, tokens: Tokens) -> torch.Tensor:
        values = plain_logprobs(x, weight, tokens)
        return torch.cat([values[:-1], factor * values[-1:]])

    return Pair(ours, plain_logprobs)


@pytest.mark.parametrize("shape", [Shape(9, 41), Shape(9, 41, 24)], ids=str)
def test_one_wrong_row_among_many_chunks_shows_in_every_distance(shape):
    problem = make_problem(shape, SMOKE, "float32", is_masked=True)
    right, wrong, broken = (
        distances(plain_but(factor), problem, truth_bytes=1) for factor in (1.0, 1.01, torch.nan)
    )
    for distance in (right.value, right.grad_x, right.grad_weight):
        assert distance is None or (distance.absolute < 1e-5 and distance.relative < 1e-5)
    for distance in (wrong.value, wrong.grad_x, wrong.grad_weight):
        assert distance is None or (distance.absolute > 1e-5 and distance.relative > 1e-5)
    assert broken.value.absolute != broken.value.absolute
    assert broken.grad_x.relative != broken.grad_x.relative
