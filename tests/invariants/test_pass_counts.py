"""What a step's updates read, counted at the backbones, and that one pass is as good as several."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import tiny
from gad_fast import TextCodec
from gad_fast.config import HardwareSettings
from gad_fast.game.steps import train_discriminator, train_student
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student, load_student
from gad_fast.records import EncodedExample, Example, Group, Ids, Response

B, G, P, R = 3, 4, 5, 6
CPU = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))
BUDGETS = [1000, P + (G + 1) * R, 2 * (P + (G + 1) * R)]
"""All groups in one micro-batch, one in each, and two and one."""


class Gradients:
    """Stands where an optimizer does, and keeps the gradients instead of using them."""

    learning_rate = 0.0

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.kept: dict[str, Tensor] = {}

    def update(self, loss: float) -> float:
        del loss
        self.kept = gradients(self._module)
        self._module.zero_grad()
        return 0.0


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.fixture
def players(tmp_path: Path) -> tuple[Student, Discriminator]:
    recipe = tiny.recipe(tmp_path, student={"dtype": "float64"}, discriminator={"dtype": "float64"})
    torch.manual_seed(3)
    codec = TextCodec.from_pretrained(recipe.student.model)
    student = load_student(recipe, CPU)
    return student, load_discriminator(recipe, student, codec, CPU)


def equal_groups() -> list[Group]:
    """Groups without padding, whatever the layout: each prompt and each response is as long."""
    generator = np.random.default_rng(5)

    def ids(count: int) -> Ids:
        return generator.integers(6, 16, count).astype(np.int32)

    def response() -> Response:
        return Response(ids(R), is_finished=False)

    example = Example([{"role": "user", "content": ""}], "")
    return [
        Group(EncodedExample(example, ids(P), response()), [response() for _ in range(G)])
        for _ in range(B)
    ]


@contextlib.contextmanager
def tokens_read(model: Any) -> Generator[list[int]]:
    """Tokens of each forward pass of a backbone."""
    counts: list[int] = []

    def count(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        counts.append(inputs["input_ids"].numel())

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_discriminator_reads_each_prompt_and_response_once(players, budget):
    _, discriminator = players
    with tokens_read(discriminator.model) as counts:
        optimizer: Any = Gradients(discriminator)
        train_discriminator(discriminator, optimizer, equal_groups(), token_budget=budget)
    assert sum(counts) == B * (P + (G + 1) * R)
    assert len(counts) == {BUDGETS[0]: 1, BUDGETS[1]: B, BUDGETS[2]: 2}[budget]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_student_reads_each_prompt_and_rollout_once_and_the_reference_only_for_kl(
    players, kl_coef
):
    student, _ = players
    reference = student.frozen_copy() if kl_coef else None
    read_by_reference = tokens_read(reference.model) if reference else contextlib.nullcontext([])
    optimizer: Any = Gradients(student)
    with tokens_read(student.model) as counts, read_by_reference as reference_counts:
        train_student(
            student,
            reference,
            optimizer,
            equal_groups(),
            torch.randn(B, G),
            kl_coef=kl_coef,
            temperature=0.8,
            token_budget=BUDGETS[1],
        )
    assert sum(counts) == B * (P + G * R)
    assert sum(reference_counts) == (B * (P + G * R) if kl_coef else 0)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_one_pass_gives_the_rewards_and_gradients_of_separate_ones(players, budget, is_shared):
    _, discriminator = players
    discriminator.shares_prompts = is_shared
    groups = equal_groups()
    optimizer: Any = Gradients(discriminator)
    if not is_shared:
        budget *= 2  # each response takes a row of its own, with the prompt
    verdict = train_discriminator(discriminator, optimizer, groups, token_budget=budget)
    rewards, expected = separate_passes(discriminator, groups)
    # transformers' norms compute in float32, and a row's length decides how its sums are split.
    assert_close(verdict.scores.double(), rewards, atol=1e-6, rtol=1e-6)
    for name, gradient in expected.items():
        assert_close(optimizer.kept[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def separate_passes(
    discriminator: Discriminator, groups: list[Group]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores without a graph first; then each pair's loss, the teacher read once for each rollout.

    Source: order and pass counts of the official code.
    """
    model: Any = discriminator.model

    def score(group: Group, response: Response) -> Tensor:
        ids = torch.tensor([[*group.prompt.prompt_ids, *response.ids]])
        return model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1])[0]

    with torch.no_grad():
        rewards = torch.stack([score(g, rollout) for g in groups for rollout in g.rollouts])
    for group in groups:
        for rollout in group.rollouts:
            margin = score(group, group.prompt.teacher) - score(group, rollout)
            (-logsigmoid(margin) / (B * G)).backward()
    expected = gradients(discriminator)
    discriminator.zero_grad()
    return rewards.unflatten(0, (B, G)), expected
