"""The trainer's passes of a step: as the game plays them, each saving undone, and the paper's own.

A variant works on both players as they are: its steps update them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gad_fast import kernels
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.steps import train_discriminator, train_student
from gad_fast.models.batch import Item, PaddedBatch, pad
from gad_fast.models.discriminator import Discriminator
from gad_fast.models.student import Student
from gad_fast.records import Group

TEMPERATURE = 0.8
KL_COEF = 0.001


@dataclass
class Table:
    """Both players, the reference, and the groups of a step."""

    student: Student
    reference: Student | None
    discriminator: Discriminator
    student_optimizer: PlayerOptimizer
    discriminator_optimizer: PlayerOptimizer
    groups: list[Group]
    token_budget: int
    padded_rows: int = 16
    """Sequences of a micro-batch where whole logits are made."""

    @property
    def items(self) -> list[Item]:
        """What the student reads."""
        return [Item(group.prompt.prompt_ids, group.rollouts) for group in self.groups]


Phases = Iterator[str]
"""A step is an iterator that names each phase when it is through."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to do the passes of a step."""

    step: Callable[[Table], Phases]
    hardware: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings of `[hardware]` that it takes."""


def here(table: Table) -> Phases:
    """As the game plays it."""
    verdict = train_discriminator(
        table.discriminator,
        table.discriminator_optimizer,
        table.groups,
        token_budget=table.token_budget,
    )
    yield "discriminator"
    _train_student(table, kernels.group_advantages(verdict.scores))
    yield "student"


def row_for_each_response(table: Table) -> Phases:
    """The prompt is read again for each response."""
    for player in (table.student, table.reference, table.discriminator):
        assert player is not None
        player.shares_prompts = False
    yield from here(table)


def scoring_pass(table: Table) -> Phases:
    """Rewards from a pass of their own."""
    parts = table.discriminator.score_in_parts(table.groups, token_budget=table.token_budget)
    with torch.no_grad():
        for _ in parts:
            pass
    yield from here(table)


def old_logprobs(table: Table) -> Phases:
    """Log-probabilities of the rollouts before the update, which equal those in it."""
    with torch.no_grad():
        for _, batch in table.student.micro_batches(table.items, token_budget=table.token_budget):
            table.student.response_logprobs(batch, temperature=TEMPERATURE)
    yield from here(table)


def without_reference(table: Table) -> Phases:
    """No KL term: what `kl_coef = 0` saves."""
    table.reference = None
    yield from here(table)


def official(table: Table) -> Phases:
    """The passes of the paper's code: padded rows, whole logits, the teacher read n times."""
    num_rollouts = sum(len(group.rollouts) for group in table.groups)
    pairs = [(group, rollout) for group in table.groups for rollout in group.rollouts]
    students = [Item(group.prompt.prompt_ids, [rollout]) for group, rollout in pairs]
    teachers = [Item(group.prompt.prompt_ids, [group.prompt.teacher]) for group, _ in pairs]
    with torch.no_grad():
        scores = torch.cat([table.discriminator.score(batch) for batch in _padded(table, students)])
    both = zip(_padded(table, students), _padded(table, teachers), strict=True)
    for ours, theirs in both:
        margin = table.discriminator.score(theirs) - table.discriminator.score(ours)
        (-torch.nn.functional.logsigmoid(margin).sum() / num_rollouts).backward()
    table.discriminator_optimizer.update(0.0)
    yield "discriminator"
    advantages = kernels.group_advantages(scores.unflatten(0, (len(table.groups), -1))).flatten()
    _official_student(table, students, advantages)
    yield "student"


VARIANTS = {
    "here": Variant(here),
    "a row for each response": Variant(row_for_each_response),
    "a scoring pass": Variant(scoring_pass),
    "old log-probs": Variant(old_logprobs),
    "no reference": Variant(without_reference),
    "compiled layers": Variant(here, {"compile_layers": True}),
    "official": Variant(official),
}


def _official_student(table: Table, items: list[Item], advantages: Tensor) -> None:
    parts = list(_padded(table, items))
    num_tokens = sum(int(batch.lengths.sum()) for batch in parts)
    assert table.reference is not None
    with torch.no_grad():
        old = [_whole_logits(table.student, batch) for batch in parts]
        reference = [_whole_logits(table.reference, batch) for batch in parts]
    sizes = [len(batch.lengths) for batch in parts]
    for batch, before, kl_to, advantage in zip(
        parts, old, reference, advantages.split(sizes), strict=True
    ):
        logprobs = _whole_logits(table.student, batch)
        ratio = (logprobs - before).exp()
        distance = kl_to - logprobs
        policy = -ratio * advantage.repeat_interleave(batch.lengths)
        kl = distance.exp() - distance - 1.0
        ((policy + KL_COEF * kl).sum() / num_tokens).backward()
    table.student_optimizer.update(0.0)


def _whole_logits(student: Student, batch: PaddedBatch) -> Tensor:
    """Log-probabilities by a log-softmax over all positions, prompts included."""
    model: Any = student.model
    student.activate()
    with student.precision.forward_pass(model):
        hidden = model.base_model(**batch.model_inputs, use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    logprobs = (logits[:, :-1].float() / TEMPERATURE).log_softmax(-1)
    of_next = logprobs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    is_response = batch.attention_mask[:, batch.prompt_width :].bool()
    return of_next[:, batch.prompt_width - 1 :][is_response]


def _padded(table: Table, items: list[Item]) -> Iterator[PaddedBatch]:
    pad_id = table.discriminator.reader.codec.end_id
    for start in range(0, len(items), table.padded_rows):
        part = items[start : start + table.padded_rows]
        yield pad(part, pad_id=pad_id, device=table.student.device)


def _train_student(table: Table, advantages: Tensor) -> None:
    train_student(
        table.student,
        table.reference,
        table.student_optimizer,
        table.groups,
        advantages,
        kl_coef=KL_COEF,
        temperature=TEMPERATURE,
        token_budget=table.token_budget,
    )
