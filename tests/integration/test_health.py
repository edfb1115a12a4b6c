"""Each alarm, provoked for real: a run that goes wrong in its way, and what its watch says."""

from pathlib import Path
from typing import Any

import pytest
import torch

import crash
import tiny
from gad_fast import train
from gad_fast.errors import HealthError, NonFiniteError
from gad_fast.run.complete import is_complete

FROZEN = {"peak": 0.0}
FAST = {"peak": 3e-2}
SHARP = {"group_size": 3, "temperature": 0.01}


def alarms(folder: Path, **sections: Any) -> dict[str, dict[str, Any]]:
    """Trains; the first alarm of each name."""
    train(tiny.recipe(folder, **sections))
    lines = crash.records(folder / "run/metrics.jsonl")
    return {line["alarm"]: line for line in reversed(lines) if line["stage"] == "health"}


def one_word_rows(folder: Path, response: str) -> None:
    """Every teacher response is the same, so that a discriminator can learn it at once."""
    tiny.write_rows(
        folder / "rows.jsonl", [{**r, "teacher_response": response} for r in tiny.rows()]
    )


def test_a_quiet_run_raises_no_alarm(tmp_path: Path) -> None:
    # Of two held-out pairs nothing follows.
    assert alarms(tmp_path, health={"weak_discriminator": {"action": "off"}}) == {}


def test_rollouts_that_do_not_end_are_told(tmp_path: Path) -> None:
    short = {"max_response_tokens": 2}
    found = alarms(tmp_path, data=short, health={"truncation": {"window": 3}})
    assert found["truncation"]["step"] == 3
    assert found["truncation"]["value"] > 0.8
    assert found["truncation"]["action"] == "warn"


def test_loops_and_groups_without_variance_are_told(tmp_path: Path) -> None:
    """At a temperature near 0 a random student loops, and always in the same way."""
    sections = {"rollout": SHARP, "data": {"max_response_tokens": 24}}
    sections["batch"] = {"tokens_per_micro_batch": 240}
    windows = {"repetition": {"window": 2}, "zero_variance": {"window": 2}}
    found = alarms(tmp_path, **sections, health=windows)
    assert found["repetition"]["value"] > 0.3
    assert found["zero_variance"]["value"] > 0.5


def test_a_discriminator_that_wins_at_once_is_told(tmp_path: Path) -> None:
    one_word_rows(tmp_path, "sky sky sky")
    stage = {"steps": 8, "discriminator": FAST, "discriminator_only_steps": 8}
    health = {"shortcut": {"threshold": 0.9}, "saturation": {"window": 3}}
    found = alarms(tmp_path, warmup=stage, health=health)
    assert found["shortcut"]["step"] <= 5
    assert found["saturation"]["step"] > found["shortcut"]["step"]


def test_scores_that_go_by_length_are_told(tmp_path: Path) -> None:
    """The teacher always gives one word: shorter is better, whatever it says."""
    one_word_rows(tmp_path, "sun")
    stage = {"steps": 10, "discriminator": FAST, "discriminator_only_steps": 10}
    found = alarms(tmp_path, warmup=stage, health={"length_correlation": {"window": 3}})
    assert found["length_correlation"]["value"] > 0.6


def test_a_student_that_leaves_its_reference_is_told(tmp_path: Path) -> None:
    found = alarms(tmp_path, game={"steps": 6, "student": FAST}, health={"kl": {"window": 2}})
    assert found["kl"]["value"] > 0.5


def test_a_frozen_discriminator_is_exploited(tmp_path: Path) -> None:
    game = {"steps": 12, "student": FAST, "discriminator": FROZEN, "kl_coef": 0.0}
    found = alarms(tmp_path, warmup={"steps": 1}, game=game, health={"exploited": {"window": 4}})
    assert found["exploited"]["value"] < 0.45


def test_a_pause_holds_the_discriminator_while_the_alarm_lasts(tmp_path: Path) -> None:
    one_word_rows(tmp_path, "sky sky sky")
    stage = {"steps": 8, "discriminator": FAST, "discriminator_only_steps": 8}
    health = {"saturation": {"window": 2, "action": "pause", "threshold": 0.6}}
    every = {"checkpoint_every_steps": 1, "keep_last": 99}
    found = alarms(tmp_path, warmup=stage, health=health, run=every)
    lines = crash.records(tmp_path / "run/metrics.jsonl")
    by_step = {line["step"]: line for line in lines if "d_acc" in line and "step_seconds" in line}
    for step in range(2, 9):
        is_paused = found["saturation"]["step"] < step
        assert (by_step[step]["discriminator_learning_rate"] == 0.0) == is_paused
        before, after = (_scorer(tmp_path, at) for at in (step - 1, step))
        assert torch.equal(before, after) == is_paused


def _scorer(folder: Path, step: int) -> torch.Tensor:
    path = folder / f"run/checkpoints/step-{step:06d}/discriminator/model.safetensors"
    return crash.load_file(path)["score.weight"]


def test_a_pause_of_the_student_makes_no_weight_version(tmp_path: Path) -> None:
    health = {"truncation": {"threshold": 0.0, "window": 2, "action": "pause"}}
    alarms(tmp_path, health=health)
    lines = crash.records(tmp_path / "run/metrics.jsonl")
    versions = {line["step"]: line["weight_version"] for line in lines if "step_seconds" in line}
    # Step 1 is the discriminator's alone, step 2 raises the alarm at its end.
    assert versions == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}


def test_a_game_does_not_start_when_there_is_nothing_to_learn(tmp_path: Path) -> None:
    """A discriminator that never learned is right about held-out pairs by chance."""
    untrained = {"discriminator": FROZEN}
    gate = {"weak_discriminator": {"action": "stop", "threshold": 0.9}}
    sections = {"data": {"validation_fraction": 0.5}, "warmup": untrained, "seed": 2}
    with pytest.raises(HealthError, match=r"stopped at step 3, weak_discriminator is 0\..*chance"):
        train(tiny.recipe(tmp_path, **sections, health=gate))
    assert is_complete(tmp_path / "run/checkpoints/step-000003")
    gate["weak_discriminator"]["action"] = "warn"
    assert train(tiny.recipe(tmp_path, **sections, health=gate)).steps == 6


def test_a_discriminator_that_still_rises_is_trained_on(tmp_path: Path) -> None:
    """It learns to tell one teacher text, so accuracy rises and then stays."""
    one_word_rows(tmp_path, "sky sky sky")
    gate = {"rising_discriminator": {"action": "pause", "round_steps": 2, "max_steps": 20}}
    sections = {"data": {"validation_fraction": 0.5}, "health": gate}
    summary = train(tiny.recipe(tmp_path, **sections, warmup={"discriminator": {"peak": 1e-2}}))
    lines = crash.records(tmp_path / "run/metrics.jsonl")
    added = [line for line in lines if line["stage"] == "discriminator"]
    assert 2 <= len(added) < 20
    assert len(added) % 2 == 0
    assert summary.steps == 6 + len(added)
    assert all("imitation_loss" not in line for line in added)
    measured = [line["d_acc"] for line in lines if line["stage"] == "validation" and line["step"]]
    at_start = measured[:-1]  # the last is after the game
    assert at_start[-1] - at_start[-2] <= 0.02


def test_a_rise_is_told_when_warm_up_was_measured(tmp_path: Path) -> None:
    one_word_rows(tmp_path, "sky sky sky")
    sections = {"data": {"validation_fraction": 0.5}, "run": {"validate_every": 1}}
    warmup = {"steps": 2, "discriminator": {"peak": 1e-3}, "discriminator_only_steps": 2}
    found = alarms(tmp_path, **sections, warmup=warmup)
    assert found["rising_discriminator"]["step"] == 2
    assert found["rising_discriminator"]["value"] > 0.02


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_goes_on_from_before(
    tmp_path: Path,
) -> None:
    huge = {"student": {"peak": 1e30}, "steps": 5}
    every = {"checkpoint_every_steps": 1}
    recipe = tiny.recipe(tmp_path, method="seqkd", warmup=huge, run=every)
    with pytest.raises(NonFiniteError, match="stopped before the update"):
        train(recipe)
    assert is_complete(tmp_path / "run/checkpoints/step-000001")
