"""Schedules, clipping, and the gate that no broken gradient passes."""

import math

import pytest
import torch
from torch.testing import assert_close

from gad_fast.config import LearningRateSettings, OptimizerSettings
from gad_fast.errors import NonFiniteError
from gad_fast.game.optim import PlayerOptimizer, schedule


def optimizer(weight: torch.nn.Parameter, peak: float = 0.1) -> PlayerOptimizer:
    result = PlayerOptimizer("student", [weight], OptimizerSettings(max_grad_norm=0.5))
    result.begin_stage(LearningRateSettings(peak=peak), 10)
    return result


def test_linear_and_cosine_fall_to_the_floor_at_the_last_update() -> None:
    for kind, middle in (("linear", 0.55), ("cosine", 0.55)):
        rate = schedule(LearningRateSettings(peak=2.0, schedule=kind, final_fraction=0.1), 11)  # pyright: ignore
        assert rate(0) == 2.0
        assert_close(rate(5), 2.0 * middle)
        assert_close(rate(10), 0.2)
        assert_close(rate(99), 0.2)


def test_a_ramp_rises_linearly_to_the_peak() -> None:
    rate = schedule(LearningRateSettings(peak=1.0, ramp_steps=3), 10)
    assert [rate(update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_gradients_are_clipped_and_the_norm_before_is_returned() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    player = optimizer(weight)
    assert player.update(loss=11.0) == 5.0
    assert weight.grad is None
    # AdamW's first update moves each weight by the learning rate, after decay by its 1 %.
    assert_close(weight.data, torch.tensor([1.0, 2.0]) * (1 - 0.1 * 0.01) - 0.1)


def test_a_learning_rate_of_zero_freezes_the_player() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    (weight * 3).sum().backward()
    optimizer(weight, peak=0.0).update(loss=1.0)
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nothing_that_is_not_finite_reaches_the_weights(broken: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    (weight * (math.inf if broken == "gradient" else 3.0)).sum().backward()
    loss = math.nan if broken == "loss" else 1.0
    with pytest.raises(NonFiniteError, match=r"student's loss is .* stopped before the update"):
        optimizer(weight).update(loss)
    assert weight.tolist() == [1.0, 2.0]
