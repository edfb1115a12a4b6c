"""The first steps of examples/gad_in_200_lines.py, number for number, through the library.

Two implementations of one method that share no line: same models, same rollouts, float64.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import gad_in_200_lines as plain
import pairs
from gad_fast import TextCodec
from gad_fast.config import HardwareSettings, LearningRateSettings, OptimizerSettings
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.steps import imitate, train_discriminator, train_student
from gad_fast.kernels import group_advantages
from gad_fast.models.discriminator import Discriminator, Reader
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student
from gad_fast.records import EncodedExample, Example, Group, Message, Response

B, G, BUDGET = 5, 4, 40
RATES = {"student": 1e-3, "discriminator": 3e-3}


def library_response(tokens: torch.Tensor) -> Response:
    ids = tokens.to(torch.int32).numpy()
    return Response.cut(ids, end_id=plain.END, max_tokens=plain.LENGTH + 1)


def library_groups(rollouts: torch.Tensor, teacher: torch.Tensor) -> list[Group]:
    begin = torch.tensor([plain.BEGIN], dtype=torch.int32).numpy()
    example = Example([Message(role="user", content="go")], "")
    return [
        Group(
            EncodedExample(example, begin, library_response(sentence)),
            [library_response(rollout) for rollout in group],
        )
        for sentence, group in zip(teacher, rollouts, strict=True)
    ]


def library_optimizer(player: str, model: torch.nn.Module) -> PlayerOptimizer:
    optimizer = PlayerOptimizer(player, model.parameters(), OptimizerSettings(max_grad_norm=1.0))
    optimizer.begin_stage(LearningRateSettings(peak=RATES[player]), 1)
    return optimizer


def plain_optimizer(player: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATES[player])


# The norms of these models compute in float32 whatever their weights are, so that tokens laid out
# otherwise are rounded otherwise.
@pytest.mark.parametrize(("shares_prompts", "rtol"), [(False, 1e-9), (True, 1e-6)])
def test_losses_and_weights_of_the_first_steps_are_the_same(
    shares_prompts: bool, rtol: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student: Any = plain.make_student().double()
    discriminator: Any = plain.make_discriminator().double()
    pairs.tokenizer().save_pretrained(tmp_path)
    codec = TextCodec.from_pretrained(tmp_path)
    precision = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))
    ours = Student(copy.deepcopy(student), precision)
    our_discriminator = Discriminator(
        copy.deepcopy(discriminator), precision, Reader(codec, own_codec=None)
    )
    assert ours.shares_prompts
    assert our_discriminator.shares_prompts
    ours.shares_prompts = our_discriminator.shares_prompts = shares_prompts
    reference, our_reference = copy.deepcopy(student), ours.frozen_copy()
    adams = plain_optimizer("student", student), plain_optimizer("discriminator", discriminator)
    our_adam = library_optimizer("student", ours)
    our_discriminator_adam = library_optimizer("discriminator", our_discriminator)
    generator = torch.Generator().manual_seed(1)

    for step in range(4):
        rollouts = plain.sample(student, B * G).unflatten(0, (B, G))
        teacher = plain.teacher_sentences(B, generator)
        groups = library_groups(rollouts, teacher)

        loss, rewards = plain.train_discriminator(discriminator, adams[1], rollouts, teacher)
        verdict = train_discriminator(
            our_discriminator, our_discriminator_adam, groups, token_budget=BUDGET
        )
        assert_close(verdict.metrics["discriminator_loss"], loss, rtol=rtol, atol=1e-12)
        assert_close(verdict.scores, rewards.float(), rtol=1e-6, atol=1e-6)

        if step == 0:
            loss = plain.imitate(student, adams[0], teacher)
            prompts = [group.prompt for group in groups]
            metrics = imitate(ours, our_adam, prompts, token_budget=BUDGET)
            assert_close(metrics["imitation_loss"], loss, rtol=rtol, atol=1e-12)
        else:
            loss = plain.train_student(
                student, reference, adams[0], rollouts, rewards, kl_coef=0.05
            )
            metrics = train_student(
                ours,
                our_reference,
                our_adam,
                groups,
                group_advantages(rewards, scale="none"),
                kl_coef=0.05,
                temperature=1.0,
                token_budget=BUDGET,
            )
            assert_close(metrics["policy_loss"], loss, rtol=rtol, atol=1e-12)
            assert step == 1 or metrics["kl"] > 1e-6

    if shares_prompts:  # Adam makes whole steps of gradients that are roundings
        return
    for name, tensor in student.state_dict().items():
        assert_close(ours.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    for name, tensor in discriminator.state_dict().items():
        assert_close(our_discriminator.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
