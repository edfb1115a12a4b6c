"""`bradley_terry_loss` on both paths against float64 autograd of its reference."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels.bradley_terry_loss import (
    MAX_BLOCK_G,
    bradley_terry_loss,
    bradley_terry_reference,
)
from kernel_cases import DEVICE, each_backend, needs_triton

MODULE = importlib.import_module("gad_fast.kernels.bradley_terry_loss")
OPTIONS = [{}, {"margin": 0.7}, {"center_coef": 0.1}, {"margin": -0.2, "center_coef": 0.03}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def scores_of(B: int, G: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores of either order, [B] and [B, G], with gaps from hundredths to tens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = 0.4 + normal(B)
    gap = normal(B, G) * torch.logspace(-2, 1.3, B * G, dtype=torch.float64).view(B, G)
    return teacher.to(DEVICE), (teacher[:, None] - gap).to(DEVICE)


def truth(
    teacher: Tensor, student: Tensor, margin: float | Tensor = 0.0, center_coef: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of both scores in float64."""
    teacher, student = (x.double().clone().requires_grad_() for x in (teacher, student))
    loss = bradley_terry_reference(teacher, student, margin, center_coef) / student.numel()
    grad_teacher, grad_student = torch.autograd.grad(loss, (teacher, student))
    return loss.detach(), grad_teacher, grad_student


def differentiate(
    teacher: Tensor, student: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradients and metrics of the operation."""
    teacher, student = (x.clone().requires_grad_() for x in (teacher, student))
    loss, metrics = bradley_terry_loss(teacher, student, **options)
    grads = torch.autograd.grad(3.0 * loss, (teacher, student))
    return loss.detach(), grads[0] / 3.0, grads[1] / 3.0, metrics


def check(actual, expected, rtol: float, atol: float) -> None:
    for value, true_value in zip(actual[:3], expected, strict=True):
        assert_close(value.double(), true_value, rtol=rtol, atol=atol)


@each_option
@each_backend
@pytest.mark.parametrize(("B", "G"), [(1, 1), (7, 1), (5, 3), (3, 8), (2, 33)])
def test_loss_and_gradients_match_the_reference(backend, options, B, G):
    teacher, student = (scores.float() for scores in scores_of(B, G))
    actual = differentiate(teacher, student, **options, backend=backend)
    assert actual[0].dtype == torch.float32
    # A few fp32 roundings, of scores up to 100 before they are subtracted.
    check(actual, truth(teacher, student, **options), rtol=3e-6, atol=1e-6)


@each_option
def test_torch_path_keeps_float64(options):
    teacher, student = scores_of(5, 3)
    actual = differentiate(teacher, student, **options)
    check(actual, truth(teacher, student, **options), rtol=1e-12, atol=1e-14)


def test_reference_passes_gradcheck():
    inputs = [scores.requires_grad_() for scores in scores_of(3, 2)]
    assert torch.autograd.gradcheck(
        lambda t, s: bradley_terry_reference(t, s, margin=0.2, center_coef=0.1), inputs
    )


@each_backend
@pytest.mark.parametrize("gap", [1e4, 90.0, 21.0, 17.0, 5.0])
def test_large_gaps_stay_exact_on_both_sides(backend, gap):
    teacher = torch.tensor([gap, -gap], device=DEVICE)
    student = torch.zeros(2, 1, device=DEVICE)
    right, wrong = (truth(teacher[i : i + 1], student[:1]) for i in (0, 1))
    # Sums, not means, so that the small loss of the right order is not lost beside the other.
    for i, expected in enumerate((right, wrong)):
        actual = differentiate(teacher[i : i + 1], student[:1], backend=backend)
        # Relative throughout: a loss of exp(-17) is 4e-8, which log(1 + e) would round to 0.
        check(actual, expected, rtol=1e-5, atol=1e-37)
        exact = differentiate(teacher[i : i + 1].double(), student[:1].double(), backend="torch")
        check(exact, expected, rtol=1e-14, atol=0.0)
    assert_close(wrong[0].float(), torch.tensor(gap, device=DEVICE), rtol=2e-3, atol=0.0)


@each_backend
def test_margin_tensors_count_pair_by_pair(backend):
    teacher, student = (scores.float() for scores in scores_of(5, 3))
    margin = torch.linspace(-1, 2, 15, device=DEVICE).view(5, 3)
    expected = truth(teacher, student, margin=margin.double())
    check(differentiate(teacher, student, margin=margin, backend=backend), expected, 3e-6, 1e-6)
    flat = differentiate(
        teacher, student.reshape(-1), margin=margin.reshape(-1), group_size=3, backend=backend
    )
    assert_close(flat[2].double().view(5, 3), expected[2], rtol=3e-6, atol=1e-6)


@each_backend
def test_flat_scores_give_what_the_rectangle_gives(backend):
    teacher, student = (scores.float() for scores in scores_of(5, 3))
    expected = differentiate(teacher, student, backend=backend)
    flat = differentiate(teacher, student.reshape(-1), group_size=3, backend=backend)
    assert torch.equal(flat[0], expected[0])
    assert torch.equal(flat[1], expected[1])
    assert torch.equal(flat[2].view(5, 3), expected[2])
    paired = differentiate(
        teacher.repeat_interleave(3), student.reshape(-1), margin=0.0, backend=backend
    )
    assert_close(paired[0], expected[0], rtol=1e-6, atol=0.0)
    assert_close(paired[1].view(5, 3).sum(1), expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(paired[2].view(5, 3), expected[2])


@each_backend
def test_strided_scores_are_read_as_they_are(backend):
    teacher, student = (scores.float() for scores in scores_of(5, 3))
    both = torch.cat([student, teacher[:, None]], 1).requires_grad_()
    loss, _ = bradley_terry_loss(both[:, -1], both[:, :-1], backend=backend)
    (grads,) = torch.autograd.grad(loss, both)
    check((loss.detach(), grads[:, -1], grads[:, :-1]), truth(teacher, student), 3e-6, 1e-6)


@each_backend
@pytest.mark.parametrize("is_tensor", [False, True])
def test_micro_batches_with_the_steps_pairs_add_up_to_the_step(backend, is_tensor):
    teacher, student = (scores.float() for scores in scores_of(5, 3))
    whole = differentiate(teacher, student, center_coef=0.1, backend=backend)
    num_pairs = torch.tensor(15, device=DEVICE) if is_tensor else 15
    options = {"center_coef": 0.1, "num_pairs": num_pairs, "backend": backend}
    parts = [differentiate(teacher[i], student[i], **options) for i in (slice(0, 2), slice(2, 5))]
    assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-6, atol=0.0)
    teachers = torch.cat([part[1] for part in parts])
    students = torch.cat([part[2] for part in parts])
    assert_close(teachers, whole[1], rtol=1e-6, atol=1e-8)
    assert_close(students, whole[2], rtol=1e-6, atol=1e-8)


@each_backend
def test_metrics_are_means_over_pairs_without_the_margin(backend):
    teacher, student = (scores.float() for scores in scores_of(5, 3))
    student[0, 0] = teacher[0]  # a tie is not in the right order
    gap = (teacher[:, None] - student).double()
    expected = {
        "accuracy": (gap > 0).double().mean(),
        "score_gap": gap.mean(),
        "teacher_score": teacher.double().mean(),
        "student_score": student.double().mean(),
        "num_pairs": torch.tensor(15.0, dtype=torch.float64, device=DEVICE),
    }
    assert 0 < expected["accuracy"] < 1
    metrics = differentiate(teacher, student, margin=50.0, num_pairs=99, backend=backend)[3]
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].dim() == 0
        assert not metrics[name].requires_grad
        assert_close(metrics[name].double(), value, rtol=2e-6, atol=1e-6, msg=name)


@each_backend
def test_bfloat16_scores_are_computed_in_float32(backend):
    teacher, student = (scores.bfloat16() for scores in scores_of(5, 3))
    actual = differentiate(teacher, student, backend=backend)
    expected = truth(teacher, student)
    assert actual[0].dtype == torch.float32
    assert actual[2].dtype == torch.bfloat16
    assert_close(actual[0].double(), expected[0], rtol=3e-6, atol=1e-6)
    # The rounding of a gradient, and of three times it, to 8 significant bits.
    assert_close(actual[2].double(), expected[2], rtol=2**-7, atol=1e-8)


@each_backend
def test_a_broken_score_is_not_hidden(backend):
    teacher, student = (scores.float() for scores in scores_of(3, 2))
    student[1, 0] = torch.nan
    loss, grad_teacher, grad_student, metrics = differentiate(teacher, student, backend=backend)
    assert loss.isnan()
    assert metrics["score_gap"].isnan()
    assert torch.equal(grad_teacher.isnan(), torch.tensor([False, True, False], device=DEVICE))
    assert torch.equal(grad_student.isnan(), student.isnan())


@each_backend
def test_only_the_sides_that_need_a_gradient_get_one(backend):
    teacher, student = (scores.float() for scores in scores_of(3, 2))
    student.requires_grad_()
    bradley_terry_loss(teacher, student, backend=backend)[0].backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not bradley_terry_loss(teacher, student.detach(), backend=backend)[0].requires_grad


@each_backend
def test_no_pairs_give_zero(backend):
    teacher, student = torch.empty(0, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    loss, metrics = bradley_terry_loss(teacher, student, backend=backend)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())


@needs_triton
def test_groups_too_large_for_a_program_take_the_torch_path(monkeypatch):
    monkeypatch.setattr(MODULE, "_launch", None)
    teacher, student = (scores.float() for scores in scores_of(1, MAX_BLOCK_G + 1))
    expected = differentiate(teacher, student, backend="torch")
    actual = differentiate(teacher, student, backend="triton")
    assert torch.equal(actual[0], expected[0])
    with pytest.raises(TypeError):
        differentiate(teacher, student[:, :-1], backend="triton")


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_custom_op_passes_opcheck(backend):
    teacher, student = (scores.float().requires_grad_() for scores in scores_of(3, 2))
    margin = torch.full_like(student, 0.3, requires_grad=False)
    torch.library.opcheck(
        torch.ops.gad_fast.bradley_terry_loss.default, (teacher, student, margin, 0.1, backend)
    )


@each_backend
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_compiles_as_one_graph(backend, is_dynamic):
    teacher, student = (scores.float().requires_grad_() for scores in scores_of(3, 2))

    def loss(teacher, student):
        options = {"margin": 0.3, "center_coef": 0.1, "num_pairs": 99, "backend": backend}
        return bradley_terry_loss(teacher, student, **options)[0]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=is_dynamic, backend="aot_eager")
    expected = torch.autograd.grad(loss(teacher, student), (teacher, student))
    actual = torch.autograd.grad(compiled(teacher, student), (teacher, student))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_teacher": torch.zeros(3)}, r"d_student must be \[B, G\], .*got \(2, 3\) for \(3,\)"),
        ({"d_teacher": torch.zeros(2, 3)}, r"d_student must be .*got \(2, 3\) for \(2, 3\)"),
        ({"d_student": torch.zeros(6)}, r"got \(6,\) for \(2,\) with group_size=None"),
        (
            {"d_student": torch.zeros(6), "group_size": 2},
            r"got \(6,\) for \(2,\) with group_size=2",
        ),
        (
            {"d_student": torch.zeros(2), "group_size": 0},
            r"got \(2,\) for \(2,\) with group_size=0",
        ),
        ({"group_size": 3}, r"got \(2, 3\) for \(2,\) with group_size=3"),
        (
            {"d_teacher": torch.zeros(2).long()},
            r"d_teacher must be a float tensor, got torch\.int64",
        ),
        ({"d_student": torch.zeros(2, 3).int()}, r"d_student must be a float tensor"),
        (
            {"margin": torch.zeros(2)},
            r"margin must have the shape of d_student, \(2, 3\), got \(2,\)",
        ),
        ({"center_coef": -0.1}, r"center_coef must be at least 0, got -0\.1"),
        ({"backend": "cuda"}, r"backend must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments = {"d_teacher": torch.zeros(2), "d_student": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**{**arguments, **change})
