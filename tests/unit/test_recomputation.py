"""Gradient checkpointing costs time and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from gad_fast import TextCodec
from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError
from gad_fast.models.discriminator import load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.recomputation import recomputed_layers
from gad_fast.models.student import load_student
from step_groups import some_groups


def gradients(folder: Path, *, recomputes: bool, **sections: Any) -> tuple[list[Tensor], int]:
    """Of both players' losses on two groups, and the bytes that were kept for the backward pass."""
    recipe = tiny.recipe(folder, **sections)
    precision = Precision(
        HardwareSettings(device="cpu", compute_dtype="bfloat16", gradient_checkpointing=recomputes)
    )
    torch.manual_seed(1)
    student = load_student(recipe, precision)
    codec = TextCodec.from_pretrained(recipe.student.model)
    discriminator = load_discriminator(recipe, student, codec, precision)
    for parameter in [*student.trainable_parameters(), *discriminator.trainable_parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)  # fresh adapters have gradients of 0
    groups = some_groups()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = discriminator.score_groups(groups)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    (scores.student.mean() - scores.teacher.mean()).backward()
    items = [discriminator.reader.read(group) for group in groups]
    for _, batch in student.micro_batches(items, token_budget=1000):
        student.imitation_loss(batch, num_tokens=7).backward()
    trained = [*student.trainable_parameters(), *discriminator.trainable_parameters()]
    assert all(p.grad is not None for p in trained)
    return [p.grad for p in trained if p.grad is not None], num_bytes


@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "adapters"])
def test_the_gradients_are_the_same_bit_for_bit_and_less_is_kept(tmp_path, rank):
    tiny.save_student(tmp_path / "student", num_hidden_layers=4)
    lora = {"rank": rank}
    expected, all_kept = gradients(tmp_path, recomputes=False, lora=lora)
    actual, inputs_kept = gradients(tmp_path, recomputes=True, lora=lora)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    assert inputs_kept < 0.5 * all_kept


def test_after_the_pass_the_model_is_as_it_was(tmp_path):
    model = tiny.save_student(tmp_path / "student").eval()
    with recomputed_layers(model):
        assert any(layer.training for layer in model.modules())
        assert not any(norm.training for norm in model.modules() if "Norm" in type(norm).__name__)
    assert not any(layer.training for layer in model.modules())
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())


def test_layers_that_cannot_be_computed_again_are_a_mistake_of_the_recipe():
    with (
        pytest.raises(ConfigError, match=r"hardware.gradient_checkpointing .* with Linear"),
        recomputed_layers(nn.Linear(2, 2)),
    ):
        pass
