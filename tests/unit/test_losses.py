"""Losses and advantages against float64 autograd of their formulas, written out anew."""

import pytest
import torch
from torch.testing import assert_close

from gad_fast.losses.advantages import group_advantages
from gad_fast.losses.bradley_terry import bradley_terry_loss
from gad_fast.losses.imitation import imitation_loss
from gad_fast.losses.policy import k3, policy_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(values: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return values.detach().to(dtype).requires_grad_()


def test_bradley_terry_is_the_mean_of_minus_log_sigmoid_of_the_differences() -> None:
    teacher, student = random(3) * 4, random(3, 5, seed=1) * 4
    expected = -torch.sigmoid(teacher.double()[:, None] - student.double()).log()
    assert_close(bradley_terry_loss(teacher, student).double(), expected, atol=1e-6, rtol=1e-6)


def test_bradley_terry_gradient_is_sigmoid_of_the_difference_on_each_side() -> None:
    teacher, student = leaf(random(3) * 4), leaf(random(3, 5, seed=1) * 4)
    bradley_terry_loss(teacher, student).sum().backward()
    weight = torch.sigmoid(student.double() - teacher.double()[:, None])
    assert teacher.grad is not None
    assert student.grad is not None
    assert_close(student.grad.double(), weight.detach(), atol=1e-6, rtol=1e-6)
    assert_close(teacher.grad.double(), -weight.sum(dim=1).detach(), atol=2e-6, rtol=1e-6)


def test_bradley_terry_stays_finite_where_sigmoid_does_not() -> None:
    teacher, student = leaf(torch.tensor([-300.0, 300.0])), torch.tensor([[300.0], [-300.0]])
    losses = bradley_terry_loss(teacher, student)
    losses.sum().backward()
    assert losses.tolist() == [[600.0], [0.0]]
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(("scale", "floor"), [("std", 0.0), ("none", 0.0)])
def test_advantages_do_not_change_under_affine_maps(scale: str, floor: float) -> None:
    rewards = random(4, 7).double()
    advantages = group_advantages(rewards, scale=scale, std_floor=floor)  # pyright: ignore
    mapped = group_advantages(2.5 * rewards - 11.0, scale=scale, std_floor=floor)  # pyright: ignore
    factor = 1.0 if scale == "std" else 2.5
    assert_close(mapped, factor * advantages, atol=1e-5, rtol=1e-5)


def test_std_advantages_have_mean_zero_and_sample_deviation_one() -> None:
    advantages = group_advantages(random(4, 7).double() * 3)
    assert_close(advantages.mean(dim=1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    assert_close(advantages.std(dim=1), torch.ones(4).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_of_equal_scores_has_advantages_of_exactly_zero(scale: str) -> None:
    # Seven times 0.1 has a mean that is not 0.1 in float32.
    rewards = torch.stack([torch.full((7,), 0.1), torch.arange(7.0), torch.full((7,), -3e8)])
    advantages = group_advantages(rewards, scale=scale)  # pyright: ignore
    assert advantages[0].tolist() == [0.0] * 7
    assert advantages[2].tolist() == [0.0] * 7
    assert advantages[1].abs().min() == 0.0
    assert advantages[1].abs().max() > 1.0


def test_a_floor_keeps_the_noise_of_a_homogeneous_group_small() -> None:
    rewards = torch.tensor([[0.001, -0.001]])
    assert group_advantages(rewards).abs().max() > 0.7
    assert_close(group_advantages(rewards, std_floor=0.5), rewards / 0.5, atol=1e-8, rtol=1e-4)


def test_policy_loss_and_gradient_equal_float64_autograd() -> None:
    logprobs, reference = -random(9).abs(), -random(9, seed=2).abs()  # k3 below its bound
    advantages = random(9, seed=1)
    ours = leaf(logprobs)
    result = policy_loss(ours, advantages, reference_logprobs=reference, kl_coef=0.3, num_tokens=20)
    result.loss.backward()

    truth = leaf(logprobs, torch.float64)
    ratio = (truth - logprobs.double()).exp()
    difference = reference.double() - truth
    kl = (difference.exp() - difference - 1).sum() / 20
    loss = -(advantages.double() * ratio).sum() / 20 + 0.3 * kl
    loss.backward()
    assert_close(result.loss.double(), loss, atol=1e-6, rtol=1e-6)
    assert_close(result.kl.double(), kl.detach(), atol=1e-6, rtol=1e-6)
    assert ours.grad is not None
    assert truth.grad is not None
    assert_close(ours.grad.double(), truth.grad, atol=1e-7, rtol=1e-5)


def test_policy_gradient_without_a_reference_is_minus_the_advantages() -> None:
    logprobs, advantages = leaf(-random(5).exp()), random(5, seed=1)
    result = policy_loss(logprobs, advantages, reference_logprobs=None, kl_coef=0.3, num_tokens=10)
    result.loss.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, -advantages / 10)
    assert result.kl == 0.0


def test_k3_is_zero_at_equality_and_bounded_far_from_it() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -60.0, -0.1])
    reference = torch.tensor([-1.0, -1.5, -0.1, -60.0])
    values = k3(logprobs, reference)
    assert values[0] == 0.0
    assert_close(values[1], torch.tensor(-0.5).exp() + 0.5 - 1)
    assert values[2] == 10.0
    assert values[3] == 10.0


def test_imitation_losses_of_micro_batches_add_up_to_the_token_mean() -> None:
    logprobs = leaf(-random(12).exp())
    parts = [imitation_loss(part, num_tokens=12) for part in logprobs.split(5)]
    total = torch.stack(parts).sum()
    assert_close(total, -logprobs.mean())
    total.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.full((12,), -1 / 12))
