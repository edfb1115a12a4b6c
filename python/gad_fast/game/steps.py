"""The training verbs of a step: train the discriminator, imitate, train the student.

Each training verb works through token-budgeted micro-batches and makes exactly one update; every
loss is divided by the tokens or pairs of the whole step, so the budget changes memory, never the
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast import kernels
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.models.batch import Batch, Item
from gad_fast.models.discriminator import Discriminator
from gad_fast.models.student import Student
from gad_fast.records import EncodedExample, Group

Metrics = dict[str, float]

NO_SPREAD = 1e-5
"""Standard deviation of a group's scores that roundings alone can make."""


class Verdict(NamedTuple):
    """What the discriminator thought of a step before it learned from it."""

    scores: Tensor
    """Float [B, G] on the CPU: the rollouts' scores, which are the student's rewards."""
    metrics: Metrics


def train_discriminator(
    discriminator: Discriminator,
    optimizer: PlayerOptimizer,
    groups: Sequence[Group],
    *,
    token_budget: int,
) -> Verdict:
    """One Bradley-Terry update; the scores are those of the discriminator before it.

    The forward pass that trains is the one that rewards: it is not run twice.
    """
    group_size = len(groups[0].rollouts)
    teacher_scores = torch.empty(len(groups))
    student_scores = torch.empty(len(groups), group_size)
    total_loss = 0.0
    for indices, scores in discriminator.score_in_parts(groups, token_budget=token_budget):
        loss, _ = kernels.bradley_terry_loss(
            scores.teacher, scores.student, num_pairs=student_scores.numel()
        )
        loss.backward()
        total_loss += loss.item()
        teacher_scores[indices] = scores.teacher.detach().float().cpu()
        student_scores[indices] = scores.student.detach().float().cpu()
    grad_norm = optimizer.update(total_loss)
    metrics = {
        "discriminator_loss": total_loss,
        "discriminator_grad_norm": grad_norm,
        "discriminator_learning_rate": optimizer.learning_rate,
        **score_metrics(teacher_scores, student_scores),
    }
    return Verdict(student_scores, metrics)


def imitate(
    student: Student,
    optimizer: PlayerOptimizer,
    prompts: Sequence[EncodedExample],
    *,
    token_budget: int,
) -> Metrics:
    """One update on the cross-entropy of the teacher's responses."""
    items = [Item(prompt.prompt_ids, [prompt.teacher]) for prompt in prompts]
    num_tokens = sum(len(prompt.teacher) for prompt in prompts)
    total_loss = 0.0
    for _, batch in student.micro_batches(items, token_budget=token_budget):
        loss = student.imitation_loss(batch, num_tokens=num_tokens)
        loss.backward()
        total_loss += loss.item()
    grad_norm = optimizer.update(total_loss)
    return {
        "imitation_loss": total_loss,
        "student_grad_norm": grad_norm,
        "student_learning_rate": optimizer.learning_rate,
    }


def train_student(
    student: Student,
    reference: Student | None,
    optimizer: PlayerOptimizer,
    groups: Sequence[Group],
    advantages: Tensor,
    *,
    kl_coef: float,
    temperature: float,
    token_budget: int,
) -> Metrics:
    """One policy-gradient update on the rollouts, with KL to the reference if there is one.

    Args:
        student: the player to update.
        reference: the frozen student after warm-up, or None.
        optimizer: the student's.
        groups: B groups.
        advantages: Float [B, G].
        kl_coef: weight of the KL estimate.
        temperature: that of the rollouts.
        token_budget: padded tokens a micro-batch may hold.
    """
    items = [Item(group.prompt.prompt_ids, group.rollouts) for group in groups]
    num_tokens = sum(len(rollout) for group in groups for rollout in group.rollouts)
    flat_advantages = advantages.flatten().to(student.device)
    totals = dict.fromkeys(("policy_loss", "kl", "entropy"), 0.0)
    for indices, batch in student.micro_batches(items, token_budget=token_budget):
        loss, means = student.policy_loss(
            batch,
            flat_advantages[indices].repeat_interleave(batch.lengths),
            temperature=temperature,
            ref_logp=_reference_logprobs(reference, batch, temperature),
            kl_coef=kl_coef if reference is not None else 0.0,
            num_tokens=num_tokens,
        )
        loss.backward()
        totals["policy_loss"] += loss.item()
        for name in ("kl", "entropy"):
            totals[name] += (means[name] * means["num_tokens"]).item() / num_tokens
    grad_norm = optimizer.update(totals["policy_loss"])
    return {
        **totals,
        "student_grad_norm": grad_norm,
        "student_learning_rate": optimizer.learning_rate,
    }


def score_metrics(teacher_scores: Tensor, student_scores: Tensor) -> Metrics:
    """Accuracy and spread of scores Float [B] and [B, G]."""
    spread = student_scores.std(dim=1) if student_scores.shape[1] > 1 else torch.zeros(1)
    return {
        "d_acc": (teacher_scores[:, None] > student_scores).float().mean().item(),
        "teacher_score": teacher_scores.mean().item(),
        "student_score": student_scores.mean().item(),
        "score_gap": (teacher_scores[:, None] - student_scores).mean().item(),
        "reward_std": spread.mean().item(),
        "zero_variance_groups": (spread < NO_SPREAD).float().mean().item(),
    }


def length_metrics(groups: Sequence[Group]) -> Metrics:
    """Lengths in tokens and truncation rates of both sides."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    teachers = [group.prompt.teacher for group in groups]
    return {
        "rollout_length": sum(map(len, rollouts)) / len(rollouts),
        "teacher_length": sum(map(len, teachers)) / len(teachers),
        "rollout_truncation": sum(not r.is_finished for r in rollouts) / len(rollouts),
        "teacher_truncation": sum(not t.is_finished for t in teachers) / len(teachers),
    }


def _reference_logprobs(
    reference: Student | None, batch: Batch, temperature: float
) -> Tensor | None:
    if reference is None:
        return None
    with torch.no_grad():
        return reference.response_logprobs(batch, temperature=temperature)
