"""Adapters: one set of weights for student, discriminator and reference, and nothing mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from gad_fast import Recipe, TextCodec
from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError, ModelError
from gad_fast.models.batch import Item, pad
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student, load_student
from gad_fast.records import Response
from gad_fast.training import train

CPU = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))
ITEMS = [
    Item(
        np.array([1, 2, 8], dtype=np.int32),
        [Response(np.array([9, 7, 4], dtype=np.int32), is_finished=True)],
    )
]


def recipe(folder: Path, **lora: Any) -> Recipe:
    exact = {"dtype": "float64"}
    return tiny.recipe(
        folder, student=exact, discriminator=exact, lora={"rank": 3, "alpha": 6.0, **lora}
    )


def players(folder: Path, **lora: Any) -> tuple[Student, Discriminator]:
    chosen = recipe(folder, **lora)
    torch.manual_seed(1)
    student = load_student(chosen, CPU)
    codec = TextCodec.from_pretrained(chosen.student.model)
    return student, load_discriminator(chosen, student, codec, CPU)


def batch() -> Any:
    return pad(ITEMS, pad_id=0, device=torch.device("cpu"))


def logprobs(student: Student) -> torch.Tensor:
    with torch.no_grad():
        return student.response_logprobs(batch(), temperature=0.7)


def move(player: Student | Discriminator, seed: int) -> None:
    """As an update does."""
    torch.manual_seed(seed)
    for parameter in player.trainable_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def test_fresh_adapters_change_nothing(tmp_path):
    student, discriminator = players(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float64)
    assert_close(logprobs(student), logprobs(Student(plain, CPU)))
    hidden = plain.base_model(**batch().model_inputs).last_hidden_state
    expected = discriminator.head(batch().last_tokens(hidden)).flatten()
    assert_close(discriminator.score(batch()), expected)


def test_all_players_read_through_the_same_weights(tmp_path):
    student, discriminator = players(tmp_path)
    reference = student.frozen_copy()
    assert student.model.base_model is discriminator.model.base_model is reference.model.base_model
    frozen = [p for n, p in student.model.named_parameters() if ".lora_" not in n]
    assert not any(p.requires_grad for p in frozen)


def test_an_update_of_one_player_leaves_the_others_where_they_were(tmp_path):
    student, discriminator = players(tmp_path)
    move(student, 2)
    reference = student.frozen_copy()
    before, score = logprobs(student), discriminator.score(batch()).detach()
    move(student, 3)
    assert_close(logprobs(reference), before, rtol=0, atol=0)
    assert_close(discriminator.score(batch()).detach(), score, rtol=0, atol=0)
    after = logprobs(student)
    assert (after - before).abs().max() > 1e-3
    move(discriminator, 4)
    assert (discriminator.score(batch()).detach() - score).abs().max() > 1e-3
    assert_close(logprobs(student), after, rtol=0, atol=0)


def test_gradients_land_in_the_player_that_learns_and_nowhere_else(tmp_path):
    student, discriminator = players(tmp_path)
    move(student, 2)
    move(discriminator, 3)
    student.imitation_loss(batch(), num_tokens=3).backward()
    assert all(p.grad is not None for p in student.trainable_parameters())
    assert all(p.grad is None for p in discriminator.trainable_parameters())
    student.model.zero_grad()
    # The student reads in between: the discriminator's backward pass must not notice.
    score = discriminator.score(batch()).sum()
    logprobs(student)
    score.backward()
    assert all(p.grad is not None for p in discriminator.trainable_parameters())
    assert all(p.grad is None for p in student.trainable_parameters())


def test_the_reference_is_never_trained(tmp_path):
    student, _ = players(tmp_path)
    reference = student.frozen_copy()
    assert reference.learned.adapter is not None
    logprobs(reference)
    student.imitation_loss(batch(), num_tokens=3).backward()
    logprobs(reference)
    assert not any(p.requires_grad for p in reference.learned.adapter.parameters())
    assert all(p.grad is None for p in reference.learned.adapter.parameters())


def test_saved_players_load_in_transformers_and_in_peft_with_the_same_numbers(tmp_path):
    student, discriminator = players(tmp_path)
    move(student, 2)
    move(discriminator, 3)
    student.save(tmp_path / "S", TextCodec.from_pretrained(tmp_path / "student"))
    discriminator.save(tmp_path / "D")
    base, exact = tmp_path / "student", {"dtype": torch.float64}
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "S", **exact)
    adapted: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, **exact), str(tmp_path / "S" / "adapter")
    )
    for model in (merged, adapted.merge_and_unload()):
        assert_close(logprobs(Student(model, CPU)), logprobs(student), rtol=1e-6, atol=1e-6)

    options = {"num_labels": 1, **exact}
    scorers: list[Any] = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "D", **options),
        PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, **options),
            str(tmp_path / "D" / "adapter"),
        ),
    ]
    ids = torch.tensor([[*ITEMS[0].prompt_ids, *ITEMS[0].responses[0].ids]])
    for scorer in scorers:
        scorer.config.pad_token_id = 0
        with torch.no_grad():
            score = scorer(input_ids=ids).logits.flatten()
        assert_close(score, discriminator.score(batch()).detach(), rtol=1e-6, atol=1e-6)


def test_a_run_can_start_from_an_adapter(tmp_path):
    student, _ = players(tmp_path)
    move(student, 2)
    student.save(tmp_path / "S", TextCodec.from_pretrained(tmp_path / "student"))
    again, _ = players(tmp_path, start_from=str(tmp_path / "S" / "adapter"))
    assert_close(logprobs(again), logprobs(student), rtol=1e-12, atol=1e-12)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    tiny.save_student(tmp_path / "other", hidden_size=32)
    other, _ = players_of(tmp_path / "other", tmp_path)
    other.save(tmp_path / "S", TextCodec.from_pretrained(tmp_path / "other"))
    with pytest.raises(ModelError, match="another base model"):
        players(tmp_path, start_from=str(tmp_path / "S" / "adapter"))
    with pytest.raises(ModelError, match="another base model"):
        players(tmp_path, rank=2, start_from=str(tmp_path / "S" / "adapter"))
    with pytest.raises(ModelError, match="cannot read the adapter"):
        players(tmp_path, start_from=str(tmp_path / "nowhere"))


def players_of(model: Path, folder: Path) -> tuple[Student, Recipe]:
    chosen = recipe(folder)
    moved = chosen.model_copy(
        update={"student": chosen.student.model_copy(update={"model": str(model)})}
    )
    return load_student(moved, CPU), moved


def test_targets_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\['qproj'\] match no linear layer.*q_proj"):
        players(tmp_path, target_modules=["qproj", "v_proj"])
    with pytest.raises(ConfigError, match="match no linear layer"):
        players(tmp_path, target_modules=["lm_head"])


def test_chosen_targets_and_no_others_are_adapted(tmp_path):
    student, _ = players(tmp_path, target_modules=["v_proj"])
    adapted = {n for n, _ in student.model.named_parameters() if ".lora_A.student" in n}
    assert adapted == {f"model.layers.{i}.self_attn.v_proj.lora_A.student.weight" for i in (0, 1)}


def test_a_discriminator_of_another_model_gets_adapters_on_its_own_weights(tmp_path):
    tiny.save_student(tmp_path / "other", seed=5, hidden_size=32)
    chosen = tiny.recipe(
        tmp_path,
        student={"dtype": "float64"},
        discriminator={"model": str(tmp_path / "other"), "dtype": "float64"},
        lora={"rank": 2},
    )
    student = load_student(chosen, CPU)
    codec = TextCodec.from_pretrained(chosen.student.model)
    discriminator = load_discriminator(chosen, student, codec, CPU)
    discriminator.score(batch()).sum().backward()
    assert all(p.grad is not None for p in discriminator.trainable_parameters())
    names = {n for n, p in discriminator.model.named_parameters() if p.requires_grad}
    assert "score.weight" in names
    assert all(".lora_" in name for name in names - {"score.weight"})


def test_a_whole_run_changes_the_adapters_only(tmp_path):
    chosen = tiny.recipe(tmp_path, lora={"rank": 4})
    summary = train(chosen)
    start: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    end: Any = AutoModelForCausalLM.from_pretrained(summary.output / "student")
    is_equal = {
        name: torch.equal(weight, end.state_dict()[name])
        for name, weight in start.state_dict().items()
    }
    assert not any(equal for name, equal in is_equal.items() if name.endswith("_proj.weight"))
    assert all(equal for name, equal in is_equal.items() if not name.endswith("_proj.weight"))
    scorer: Any = AutoModelForSequenceClassification.from_pretrained(
        summary.output / "discriminator"
    )
    assert scorer.score.weight.shape == (1, 16)
