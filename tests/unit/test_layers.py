"""Layers that are recomputed or compiled give the gradients of those that are neither."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from gad_fast import TextCodec
from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError
from gad_fast.models import layers
from gad_fast.models.discriminator import load_discriminator
from gad_fast.models.layers import altered_layers, require_compiler
from gad_fast.models.loading import Precision
from gad_fast.models.student import load_student
from step_groups import some_groups


def gradients(
    folder: Path, *, rank: int, dtype: Any = "bfloat16", **hardware: bool
) -> tuple[list[Tensor], int]:
    """Of both players' losses on two groups, and the bytes that were kept for the backward pass."""
    recipe = tiny.recipe(folder, lora={"rank": rank})
    precision = Precision(HardwareSettings(device="cpu", compute_dtype=dtype, **hardware))
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
    expected, all_kept = gradients(tmp_path, rank=rank)
    actual, inputs_kept = gradients(tmp_path, rank=rank, gradient_checkpointing=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    assert inputs_kept < 0.5 * all_kept


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all weights, relative to the weight's largest gradient."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


# Dynamo looks at tensors in ways that torch itself warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "adapters"])
def test_layers_go_through_the_compiler_once_for_all_that_are_alike(
    tmp_path, monkeypatch, rank, recomputes
):
    """With a backend that runs the graphs as they are, which needs no compiler."""
    graphs, calls = [], []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *tensors: calls.append(graph) or graph(*tensors)

    compiled = torch.compile(layers._forward, backend=backend, dynamic=True)
    monkeypatch.setattr(layers, "_compiled", lambda: compiled)
    torch.compiler.reset()
    tiny.save_student(tmp_path / "student", num_hidden_layers=4)
    options = {"rank": rank, "gradient_checkpointing": recomputes}
    expected, _ = gradients(tmp_path, **options)
    assert not calls
    actual, _ = gradients(tmp_path, **options, compile_layers=True)
    assert distance(actual, expected) < 1e-6
    # Two players of four layers, and with recomputation each of them twice.
    assert len(calls) == 2 * 4 * (1 + recomputes)
    # Each adapter has its own, and a first layer whose input needs no gradient.
    assert len(graphs) <= (1 if rank == 0 else 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++, and there is no g++")
def test_compiled_layers_give_the_same_gradients(tmp_path):
    torch.compiler.reset()
    tiny.save_student(tmp_path / "student", num_hidden_layers=3)
    expected, _ = gradients(tmp_path, rank=0, dtype="float32")
    actual, _ = gradients(tmp_path, rank=0, dtype="float32", compile_layers=True)
    assert 0 < distance(actual, expected) < 1e-4


def test_without_a_compiler_compiled_layers_are_a_mistake_of_the_recipe(monkeypatch):
    settings, cpu = HardwareSettings(compile_layers=True), torch.device("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile_layers needs no-such-compiler on cpu"):
        require_compiler(settings, cpu)
    require_compiler(HardwareSettings(), cpu)


@pytest.mark.parametrize("how", [(True, False), (False, True), (True, True)])
def test_after_the_pass_the_model_is_as_it_was(tmp_path, how):
    model = tiny.save_student(tmp_path / "student").eval()
    with altered_layers(model, is_recomputed=how[0], is_compiled=how[1]):
        assert any(layer.training for layer in model.modules())
        assert not any(norm.training for norm in model.modules() if "Norm" in type(norm).__name__)
    assert not any(layer.training for layer in model.modules())
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())


def test_layers_that_cannot_be_altered_are_a_mistake_of_the_recipe():
    with (
        pytest.raises(ConfigError, match=r"gradient_checkpointing and compile_layers .* Linear"),
        altered_layers(nn.Linear(2, 2), is_recomputed=True, is_compiled=False),
    ):
        pass
