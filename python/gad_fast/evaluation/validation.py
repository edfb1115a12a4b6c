"""Held-out figures of both players, at the rollout temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gad_fast.config import Recipe
from gad_fast.evaluation.lexical import rouge_l
from gad_fast.models.batch import Item
from gad_fast.models.discriminator import Discriminator
from gad_fast.models.student import Student
from gad_fast.records import EncodedExample, Group
from gad_fast.text import TextCodec


@dataclass(frozen=True, slots=True)
class Validation:
    """Means over the held-out prompts."""

    teacher_nll: float
    """Nats a token of the teacher's responses under the student, at temperature 1."""
    rouge_l: float
    """Overlap of one rollout a prompt with the teacher's response, in [0, 1]."""
    length_ratio: float
    """Rollout tokens over teacher tokens."""
    truncation: float
    """Share of rollouts that were cut at the token limit."""
    d_acc: float | None
    """Share of prompts whose teacher response scores above the rollout; None in SeqKD."""


def validate(
    student: Student,
    discriminator: Discriminator | None,
    codec: TextCodec,
    groups: Sequence[Group],
    recipe: Recipe,
) -> Validation:
    """Figures of both players as they are now.

    Args:
        student: the player that sampled `groups`.
        discriminator: its opponent, None in SeqKD.
        codec: the student's.
        groups: one rollout for each held-out prompt.
        recipe: for the token budget.
    """
    rollouts = [group.rollouts[0] for group in groups]
    prompts = [group.prompt for group in groups]
    budget = recipe.batch.tokens_per_micro_batch
    return Validation(
        teacher_nll=teacher_nll(student, prompts, token_budget=budget),
        rouge_l=rouge_l(
            codec.decode_responses(rollouts), codec.decode_responses([p.teacher for p in prompts])
        ),
        length_ratio=sum(map(len, rollouts)) / sum(len(prompt.teacher) for prompt in prompts),
        truncation=sum(not rollout.is_finished for rollout in rollouts) / len(rollouts),
        d_acc=None
        if discriminator is None
        else pair_accuracy(discriminator, groups, token_budget=budget),
    )


def teacher_nll(student: Student, prompts: Sequence[EncodedExample], *, token_budget: int) -> float:
    """Mean negative log-likelihood of the teacher's tokens, in nats."""
    items = [Item(prompt.prompt_ids, [prompt.teacher]) for prompt in prompts]
    total = 0.0
    with torch.no_grad():
        for _, batch in student.micro_batches(items, token_budget=token_budget):
            total -= student.response_logprobs(batch, temperature=1.0).sum().item()
    return total / sum(len(prompt.teacher) for prompt in prompts)


def pair_accuracy(
    discriminator: Discriminator, groups: Sequence[Group], *, token_budget: int
) -> float:
    """Share of (rollout, teacher response) pairs in which the teacher's scores higher."""
    num_right = num_pairs = 0
    with torch.no_grad():
        for _, scores in discriminator.score_in_parts(groups, token_budget=token_budget):
            num_right += int((scores.teacher.unsqueeze(1) > scores.student).sum())
            num_pairs += scores.student.numel()
    return num_right / num_pairs
