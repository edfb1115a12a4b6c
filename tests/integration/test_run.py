"""Runs of a tiny student through `train()`: what they leave, and what must not change them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from gad_fast import Recipe, train
from gad_fast.errors import EngineError, Interrupted, ModelError, NonFiniteError, RunFolderError
from gad_fast.run.complete import is_complete
from gad_fast.run.recorder import Recorder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, run={"checkpoint_every_steps": 2, "keep_last": 2})
    summary = train(recipe)
    run = tmp_path / "run"
    assert summary.steps == 6
    assert list(summary.validations) == ["start", "warm-up", "game"]
    assert Recipe.model_validate_json((run / "recipe.json").read_text()) == recipe
    checkpoints = sorted(folder.name for folder in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-000004", "step-000006"]
    assert all(is_complete(run / "checkpoints" / name) for name in checkpoints)
    assert AutoTokenizer.from_pretrained(run / "student").chat_template == tiny.TEMPLATE
    newest = weights(run / "checkpoints/step-000006/student")
    final = weights(run / "student")
    assert all(torch.equal(newest[name], final[name]) for name in final)


def test_metrics_hold_every_step_with_the_figures_of_its_stage(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    # Alarms, which so small a model may well raise, have lines of their own.
    lines = [line for line in metrics(tmp_path / "run") if line["stage"] != "health"]
    stages = [(line["stage"], line["step"]) for line in lines]
    assert stages == [
        ("validation", 0),
        *[("warmup", step) for step in (1, 2, 3)],
        ("validation", 3),
        *[("game", step) for step in (4, 5, 6)],
        ("validation", 6),
    ]
    both = {
        "discriminator_loss", "d_acc", "teacher_score", "student_score", "score_gap",
        "reward_std", "rollout_length", "teacher_length", "rollout_truncation",
        "teacher_truncation", "discriminator_grad_norm", "tokens_per_second",
        "rollout_seconds", "discriminator_seconds", "step_seconds", "weight_version",
    }  # fmt: skip
    student = {"student_grad_norm", "student_learning_rate", "student_seconds"}
    by_step = {line["step"]: line for line in lines if line["stage"] != "validation"}
    assert both <= set(by_step[1])
    assert not student & set(by_step[1])
    assert both | student | {"imitation_loss"} <= set(by_step[2])
    assert both | student | {"policy_loss", "kl", "entropy"} <= set(by_step[4])
    assert [by_step[step]["weight_version"] for step in range(1, 7)] == [0, 1, 2, 3, 4, 5]
    validation = {"teacher_nll", "rouge_l", "length_ratio", "truncation", "d_acc"}
    assert validation <= set(lines[0])


def test_the_reference_is_the_student_after_warm_up(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    kl = [line["kl"] for line in metrics(tmp_path / "run") if "kl" in line]
    assert kl[0] == 0.0
    assert kl[1] > 1e-6


def test_samples_show_prompt_both_sides_and_scores(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path))
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4, 5, 6]
    asked = {row["prompt"]: row["teacher_response"] for row in tiny.rows()}
    for sample in samples:
        assert asked[sample["messages"][0]["content"]] == sample["teacher_response"]
        assert len(sample["rollouts"]) == len(sample["scores"]) == 3


@pytest.mark.parametrize("budget", [37, 100_000])
def test_the_token_budget_changes_nothing(tmp_path: Path, budget: int) -> None:
    """A group a micro-batch, all at once: the same losses and weights, in float64."""
    double = {"dtype": "float64"}
    precise = {"device": "cpu", "compute_dtype": "weights"}
    sections = {"discriminator": double, "hardware": precise, "run": {"samples_per_step": 0}}
    results = []
    for tokens, name in ((80, "a"), (budget, "b")):
        tiny.values(tmp_path)  # writes the student once
        student = {"model": str(tmp_path / "student"), **double}
        batch = {"tokens_per_micro_batch": tokens}
        output = tmp_path / name
        train(tiny.recipe(tmp_path, student=student, batch=batch, output=output, **sections))
        results.append((metrics(output), weights(output / "student")))
    (lines, first), (other_lines, second) = results
    for line, other in zip(lines, other_lines, strict=True):
        for key in line.keys() & {"policy_loss", "kl", "discriminator_loss", "student_grad_norm"}:
            assert_close(line[key], other[key], rtol=1e-5, atol=1e-7)
    for name, tensor in first.items():
        # Adam turns rounding in a gradient near 0 into a step of the learning rate.
        assert_close(second[name].double(), tensor.double(), rtol=1e-4, atol=1e-5)


def test_the_same_recipe_gives_the_same_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tiny.recipe(tmp_path, output=tmp_path / name))
    first, second = (weights(tmp_path / name / "student") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "a/samples.jsonl").read_text() == (tmp_path / "b/samples.jsonl").read_text()


def test_seqkd_trains_the_student_alone(tmp_path: Path) -> None:
    summary = train(tiny.recipe(tmp_path, method="seqkd"))
    run = tmp_path / "run"
    assert summary.steps == 3
    assert summary.validations["start"].d_acc is None
    assert not (run / "discriminator").exists()
    assert not (run / "samples.jsonl").exists()
    assert all("rollout_seconds" not in line for line in metrics(run))
    nll = [v.teacher_nll for v in summary.validations.values()]
    assert nll[1] < nll[0]


def test_a_discriminator_may_have_another_backbone_and_tokenizer(tmp_path: Path) -> None:
    """Its vocabulary is in another order and larger; it reads the same texts."""
    words = ("extra", *reversed(tiny.WORDS))
    other = tmp_path / "other"
    torch.manual_seed(1)
    size = len(tiny.SPECIALS) + len(words)
    tiny.LlamaForCausalLM(tiny.llama_config(size, hidden_size=24)).save_pretrained(other)
    tiny.tokenizer(words).save_pretrained(other)
    summary = train(tiny.recipe(tmp_path, discriminator={"model": str(other)}))
    assert summary.steps == 6
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/discriminator")
    assert saved.convert_tokens_to_ids("sky") == len(tiny.SPECIALS) + 1


def test_a_discriminator_without_tokenizer_must_know_all_of_the_students_tokens(
    tmp_path: Path,
) -> None:
    small = tmp_path / "small"
    tiny.LlamaForCausalLM(tiny.llama_config(vocab_size=8)).save_pretrained(small)
    with pytest.raises(ValueError, match="has no tokenizer and 8 embeddings, but the student"):
        train(tiny.recipe(tmp_path, discriminator={"model": str(small)}))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_used_once(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, method="seqkd"))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(RunFolderError, match="already holds the finished run 'tiny'"):
        train(tiny.recipe(tmp_path))
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path: Path) -> None:
    """The learning rate of step 1 blows the weights up; step 2 must not be written down."""
    huge = {"student": {"peak": 1e30}, "steps": 5}
    recipe = tiny.recipe(tmp_path, method="seqkd", warmup=huge, run={"checkpoint_every_steps": 1})
    with pytest.raises(NonFiniteError, match=r"student's loss is .* stopped before the update"):
        train(recipe)
    run = tmp_path / "run"
    assert not (run / "student").exists()
    assert [(line["stage"], line["step"]) for line in metrics(run)] == [
        ("validation", 0),
        ("warmup", 1),
    ]
    assert is_complete(run / "checkpoints/step-000001")


def test_rollouts_of_a_broken_student_end_in_the_engines_words(tmp_path: Path) -> None:
    model = tiny.save_student(tmp_path / "student")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(EngineError, match="the student's logits are not finite"):
        train(tiny.recipe(tmp_path))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step = Recorder.write_step

    def press_ctrl_c_in_step_2(self: Recorder, step: int, *arguments: Any) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        write_step(self, step, *arguments)

    monkeypatch.setattr(Recorder, "write_step", press_ctrl_c_in_step_2)
    with pytest.raises(Interrupted, match=r"stopped at step 2; checkpoint in .*step-000002"):
        train(tiny.recipe(tmp_path))
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    assert is_complete(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["stage"], state["weight_version"]) == (2, "warmup", 1)
    assert weights(checkpoint / "student")
    assert not list((tmp_path / "run").glob("**/*.partial"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_torn_checkpoint_is_not_complete(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, method="seqkd", run={"checkpoint_every_steps": 3}))
    checkpoint = tmp_path / "run/checkpoints/step-000003"
    assert is_complete(checkpoint)
    path = checkpoint / "student/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_complete(checkpoint)


def test_a_student_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match=r"cannot load a model from .*student"):
        train(tiny.recipe(tmp_path))
    assert not (tmp_path / "run").exists()
