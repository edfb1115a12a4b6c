"""A run that is cut off anywhere goes on as if nothing had happened, bit for bit."""

import errno
import io
import itertools
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import crash
import tiny
from gad_fast import Recipe, train
from gad_fast.errors import (
    CheckpointError,
    EngineError,
    HealthError,
    Interrupted,
    RunFolderError,
)
from gad_fast.game.loop import Step
from gad_fast.rollout.groups import GroupsError
from gad_fast.rollout.static.engine import StaticEngine
from gad_fast.run import checkpoint, complete
from gad_fast.run.display import Display
from gad_fast.run.recorder import Recorder

NUM_KILLS = 25
OFTEN = {"checkpoint_every_steps": 2}


class Crash(BaseException):
    """Stands in for the end of a process."""


def recipe(folder: Path, output: str, **sections: Any) -> Recipe:
    return tiny.recipe(folder, output=folder / output, **{"run": OFTEN, **sections})


def outcome_of_unbroken(folder: Path, **sections: Any) -> dict[str, Any]:
    train(recipe(folder, "unbroken", **sections))
    return crash.outcome(folder / "unbroken")


def cut_off(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, owner: Any, name: str, call: int
) -> None:
    """Trains until the `call`-th call of a function, and crashes instead of it."""
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def crashing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Crash
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crashing)
        with pytest.raises(Crash):
            train(recipe)


def go_on(recipe: Recipe, **options: Any) -> str:
    """Trains, and returns what the screen showed."""
    console = Console(record=True, width=300, file=io.StringIO())
    train(recipe, display=Display(console), **options)
    return console.export_text()


@pytest.mark.faults
@pytest.mark.timeout(300)  # 16 s on two busy cores
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL, spread over warm-up and game; in between the run is started again each time."""
    stage = {"steps": NUM_KILLS // 2}
    runs = [recipe(tmp_path, name, warmup=stage, game=stage) for name in ("unbroken", "broken")]
    assert crash.run(runs[0]) == 0
    num_lines = crash.lines(tmp_path / "unbroken/metrics.jsonl")
    moments, metrics = random.Random(0), tmp_path / "broken/metrics.jsonl"
    for kill in range(NUM_KILLS):
        process = crash.start(runs[1])
        has_lines = kill * num_lines // NUM_KILLS
        assert crash.kill_when(process, metrics, has_lines, delay=moments.uniform(0, 0.05))
    assert crash.run(runs[1]) == 0
    crash.assert_same(crash.outcome(tmp_path / "unbroken"), crash.outcome(tmp_path / "broken"))


@pytest.mark.parametrize(("method", "rank"), [("gad", 0), ("gad", 2), ("seqkd", 0)])
def test_cut_off_in_any_step_a_run_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rank: int
) -> None:
    rates = {"peak": 1e-3, "schedule": "linear", "final_fraction": 0.1}
    stage = {"student": rates, "discriminator": rates}
    validating = {**OFTEN, "validate_every": 2}
    sections: dict[str, Any] = {"method": method, "warmup": stage, "game": stage, "run": validating}
    sections["lora"] = {"rank": rank}
    unbroken = outcome_of_unbroken(tmp_path, **sections)
    num_steps = 6 if method == "gad" else 3
    for step in range(1, num_steps + 1):
        broken = recipe(tmp_path, f"broken-{step}", **sections)
        cut_off(monkeypatch, broken, Recorder, "write_step", step)
        train(broken)
        crash.assert_same(unbroken, crash.outcome(broken.output))


def test_rollouts_that_were_sampled_are_not_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in step 5's update, with a checkpoint of step 4 only."""
    unbroken = outcome_of_unbroken(tmp_path)
    broken = recipe(tmp_path, "broken")
    cut_off(monkeypatch, broken, Step, "train_student", 2)
    generated: list[int] = []
    generate = StaticEngine.generate

    def counting(self: StaticEngine, requests: Any) -> Any:
        generated.append(requests[0].n)
        return generate(self, requests)

    monkeypatch.setattr(StaticEngine, "generate", counting)
    train(broken)
    # n is 3 in a step; the checks at the start and the validation sample one a prompt.
    assert generated.count(3) == 1
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_an_engine_that_fails_loses_only_the_groups_that_it_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 5 it fails after seven of twelve rollouts; the next start asks for the rest."""
    every = {"samples_per_step": 4, "checkpoint_every_steps": 2}
    train(recipe(tmp_path, "unbroken", run=every))
    broken = recipe(tmp_path, "broken", run=every)
    generate, asked = StaticEngine.generate, list[list[int]]()

    def failing(self: StaticEngine, requests: Any) -> Any:
        outputs = generate(self, requests)
        is_fifth = self._weight_version == 3 and requests[0].n == 3
        yield from itertools.islice(outputs, 7 if is_fifth else None)
        if is_fifth:
            raise EngineError("the device has fallen off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(StaticEngine, "generate", failing)
        with pytest.raises(GroupsError, match=r"in step 5: the device .* of 4 groups") as caught:
            train(broken)
    kept = {found.index for found in caught.value.found}
    assert 0 < len(kept) < 4

    def counting(self: StaticEngine, requests: Any) -> Any:
        asked.append([r.group_id for r in requests if r.n == 3])
        return generate(self, requests)

    monkeypatch.setattr(StaticEngine, "generate", counting)
    # What the error advises does not cost the groups.
    patient = recipe(tmp_path, "broken", run=every, rollout={"timeout_seconds": 99.0})
    text = go_on(patient)
    assert f"step 5 goes on with {len(kept)} of 4 groups" in text
    assert [sorted({0, 1, 2, 3} - kept), [0, 1, 2, 3]] == [ids for ids in asked if ids]
    ends = [
        [sorted(s["rollouts"]) for s in crash.records(samples) if s["step"] == 5]
        for samples in (tmp_path / "unbroken/samples.jsonl", tmp_path / "broken/samples.jsonl")
    ]
    # Roundings change no token of so small a model; the order in which rollouts end is another.
    assert ends[0] == ends[1]


def test_a_torn_journal_is_sampled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = outcome_of_unbroken(tmp_path)
    broken = recipe(tmp_path, "broken")
    cut_off(monkeypatch, broken, Step, "train_student", 2)
    (journal,) = (broken.output / "journal").iterdir()
    journal.write_bytes(journal.read_bytes()[:-5])
    train(broken)
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_a_broken_newest_checkpoint_is_passed_over_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = outcome_of_unbroken(tmp_path)
    broken = recipe(tmp_path, "broken")
    cut_off(monkeypatch, broken, Recorder, "write_step", 5)
    weights = broken.output / "checkpoints/step-000004/student/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    text = go_on(broken)
    assert "checkpoint step-000004 is passed over: student/model.safetensors has other" in text
    assert "from step-000002" in text
    assert (broken.output / "checkpoints/step-000004.broken").is_dir()
    shutil.rmtree(broken.output / "checkpoints/step-000004.broken")
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = outcome_of_unbroken(tmp_path)
    broken, sync = recipe(tmp_path, "broken"), complete.sync

    def full(path: Path) -> None:
        if ".step-000004.partial" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(complete, "sync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device \(the one before"):
            train(broken)
    assert [f.name for f in (broken.output / "checkpoints").iterdir()] == ["step-000002"]
    train(broken)
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_a_checkpoint_that_will_not_fit_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"takes 0\.00 GiB, but .* GiB left \(free space"):
        train(recipe(tmp_path, "run"))
    assert not crash.records(tmp_path / "run/metrics.jsonl")


def test_another_recipe_is_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, recipe(tmp_path, "run"), Recorder, "write_step", 3)
    with pytest.raises(CheckpointError, match=r"game\.kl_coef: 0\.1 -> 0\.2 .*free to change"):
        train(recipe(tmp_path, "run", game={"kl_coef": 0.2}))
    (tmp_path / "rows.jsonl").write_text("")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(25))
    with pytest.raises(CheckpointError, match="the data is not what step-000002 was trained on"):
        train(recipe(tmp_path, "run"))
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows())
    longer = {"game": {"steps": 4}, "run": {"keep_last": 1, "checkpoint_every_steps": 1}}
    assert train(recipe(tmp_path, "run", **longer)).steps == 7


def test_a_game_goes_on_with_its_own_reference_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, recipe(tmp_path, "run"), Recorder, "write_step", 5)
    (tmp_path / "run/reference/student/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"reference, which the KL term needs, .* 0 bytes of"):
        train(recipe(tmp_path, "run"))


def test_resume_and_fresh_say_what_the_folder_must_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        train(recipe(tmp_path, "run"), resume=True)
    cut_off(monkeypatch, recipe(tmp_path, "run"), Recorder, "write_step", 3)
    with pytest.raises(RunFolderError, match="already holds the run 'tiny'"):
        train(recipe(tmp_path, "run"), resume=False)
    assert "going on with the run" in go_on(recipe(tmp_path, "run"), resume=True)
    with pytest.raises(RunFolderError, match="already holds the finished run 'tiny'"):
        train(recipe(tmp_path, "run"), resume=True)


def test_two_processes_do_not_write_to_one_run(tmp_path: Path) -> None:
    endless = recipe(tmp_path, "run", warmup={"steps": 100_000})
    process = crash.start(endless)
    while not crash.lines(tmp_path / "run/metrics.jsonl"):
        assert process.is_alive()
        process.join(timeout=0.01)
    try:
        with pytest.raises(RunFolderError, match="another process trains in"):
            train(endless)
    finally:
        process.kill()
        process.join()


def test_sigterm_in_a_step_checkpoints_before_the_step_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = outcome_of_unbroken(tmp_path)
    broken, sampled = recipe(tmp_path, "broken"), Step._sampled

    def ended(self: Step) -> Any:
        groups = sampled(self)
        if self.game.steps_done == 4:
            signal.raise_signal(signal.SIGTERM)
        return groups

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_sampled", ended)
        with pytest.raises(Interrupted, match="stopped at step 4"):
            train(broken)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(broken)
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_a_step_that_outlasts_the_grace_period_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = {"run": {**OFTEN, "grace_seconds": 0.05}}
    unbroken = outcome_of_unbroken(tmp_path, **impatient)
    broken = recipe(tmp_path, "broken", **impatient)

    def endless(self: Step) -> Any:
        del self
        signal.raise_signal(signal.SIGTERM)
        while True:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(Step, "imitate", endless)
        with pytest.raises(Interrupted, match=r"left|stopped within a step 0\.05 s after SIGTERM"):
            train(broken)
    train(broken)
    crash.assert_same(unbroken, crash.outcome(broken.output))


def test_a_save_in_the_background_holds_the_step_that_it_is_named_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on while the thread waits; what it writes is the copy."""
    is_past, write_folder = threading.Event(), checkpoint.write_folder
    write_beside = Recorder.write_beside

    def late(target: Path, *arguments: Any) -> None:
        if target.name == "step-000002":
            assert is_past.wait(30)
        write_folder(target, *arguments)

    def passing(self: Recorder, *arguments: Any) -> None:
        is_past.set()
        write_beside(self, *arguments)

    sections = {"run": {**OFTEN, "keep_last": 9}, "warmup": {"steps": 2}}
    train(recipe(tmp_path, "unbroken", **sections))
    monkeypatch.setattr(checkpoint, "write_folder", late)
    monkeypatch.setattr(Recorder, "write_beside", passing)
    train(recipe(tmp_path, "slow", **sections))
    crash.assert_same(crash.outcome(tmp_path / "unbroken"), crash.outcome(tmp_path / "slow"))
    # The validation after warm-up came between the copy and the writing.
    state = checkpoint.read_state(tmp_path / "slow/checkpoints/step-000002")
    assert list(state["validations"]) == ["start"]


def test_the_best_checkpoints_outlive_the_newest(tmp_path: Path) -> None:
    every = {"checkpoint_every_steps": 100, "validate_every": 1, "keep_last": 1, "keep_best": 1}
    # Each step of the game makes the teacher's text less likely: the best is in warm-up.
    worse = {"student": {"peak": 0.3}}
    train(recipe(tmp_path, "run", run=every, game=worse))
    nll = {
        line["step"]: line["teacher_nll"]
        for line in crash.records(tmp_path / "run/metrics.jsonl")
        if line["stage"] == "validation" and line["step"]
    }
    best = min(nll, key=nll.__getitem__)
    kept = sorted(folder.name for folder in (tmp_path / "run/checkpoints").iterdir())
    assert best < 6
    assert kept == [f"step-{best:06d}", "step-000006"]


def test_minutes_bring_a_checkpoint_too(tmp_path: Path) -> None:
    often = {"checkpoint_every_steps": 100, "checkpoint_every_minutes": 1e-9, "keep_last": 9}
    train(recipe(tmp_path, "run", run=often))
    kept = sorted(folder.name for folder in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step-{step:06d}" for step in range(1, 7)]


@pytest.mark.parametrize("is_reset", [False, True])
def test_moments_live_on_from_warm_up_to_game_unless_reset(tmp_path: Path, is_reset: bool) -> None:
    every = {"checkpoint_every_steps": 1, "keep_last": 9}
    train(recipe(tmp_path, "run", run=every, game={"reset_optimizer": is_reset}))
    updates = {}
    for step in (3, 4):
        folder = tmp_path / f"run/checkpoints/step-{step:06d}/student_optimizer"
        tensors = crash.load_file(folder / "tensors.safetensors")
        updates[step] = {int(value) for name, value in tensors.items() if name.endswith("step")}
    assert updates == {3: {2}, 4: {1} if is_reset else {3}}


def test_an_alarm_that_stops_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    stop = {"truncation": {"threshold": 0.0, "window": 2, "action": "stop"}}
    with pytest.raises(HealthError, match=r"stopped at step 2, truncation is .*max_response_tok"):
        train(recipe(tmp_path, "run", health=stop))
    lines = crash.records(tmp_path / "run/metrics.jsonl")
    assert (lines[-1]["stage"], lines[-1]["alarm"]) == ("health", "truncation")
    warn = {"truncation": {"threshold": 0.0, "window": 2, "action": "warn"}}
    assert train(recipe(tmp_path, "run", health=warn)).steps == 6


def test_eight_bit_moments_and_recomputed_layers_go_on_as_well(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # Wide enough for weights whose moments are kept in bytes.
    tiny.save_student(tmp_path / "student", hidden_size=64, intermediate_size=96)
    sections = {
        "optimizer": {"name": "adamw_8bit"},
        "hardware": {"gradient_checkpointing": True},
    }
    expected = outcome_of_unbroken(tmp_path, **sections)
    broken = recipe(tmp_path, "broken", **sections)
    cut_off(monkeypatch, broken, Step, "train_discriminator", 6)
    go_on(broken)
    crash.assert_same(crash.outcome(tmp_path / "broken"), expected)
