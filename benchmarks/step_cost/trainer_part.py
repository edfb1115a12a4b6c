"""The trainer's part of a step: with all savings, with one less, and as the paper's code has it.

The rollouts are random tokens of full length, so that every variant does the same work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gad_fast import Recipe, TextCodec, kernels
from gad_fast.config import HardwareSettings, LearningRateSettings, OptimizerSettings
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.steps import train_discriminator, train_student
from gad_fast.models.batch import Item, PaddedBatch, pad
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student, load_student
from gad_fast.records import EncodedExample, Example, Group, Response
from step_cost.measure import peak_gib
from step_cost.work import KL_COEF, LEARNING_RATE, MAX_PROMPT_TOKENS, TEMPERATURE, Cost, Size, rows

ROWS_AT_ONCE = 16
"""Sequences of a micro-batch where whole logits are made."""


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

    @property
    def items(self) -> list[Item]:
        """What the student reads."""
        return [Item(group.prompt.prompt_ids, group.rollouts) for group in self.groups]


def run(model: str, size: Size, dtype: str, variant: str, num_steps: int) -> Cost:
    """Steps of one variant; the first is not counted."""
    table, step = _set_up(model, size, dtype), VARIANTS[variant]
    samples = [_timed(table, step) for _ in range(num_steps)][1:]
    seconds = {
        phase: statistics.median(sample[phase] for sample in samples) for phase in samples[0]
    }
    num_tokens = size.prompts * size.group_size * size.response_tokens
    return Cost(seconds, num_tokens, peak_gib())


Phases = Iterator[str]
"""A step is an iterator that names each phase when it is through."""
Step = Callable[[Table], Phases]


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


VARIANTS: dict[str, Step] = {
    "here": here,
    "a row for each response": row_for_each_response,
    "a scoring pass": scoring_pass,
    "old log-probs": old_logprobs,
    "no reference": without_reference,
    "official": official,
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
    with student.precision.autocast():
        hidden = model.base_model(**batch.model_inputs, use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    logprobs = (logits[:, :-1].float() / TEMPERATURE).log_softmax(-1)
    of_next = logprobs.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    is_response = batch.attention_mask[:, batch.prompt_width :].bool()
    return of_next[:, batch.prompt_width - 1 :][is_response]


def _padded(table: Table, items: list[Item]) -> Iterator[PaddedBatch]:
    pad_id = table.discriminator.reader.codec.end_id
    for start in range(0, len(items), ROWS_AT_ONCE):
        part = items[start : start + ROWS_AT_ONCE]
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


def _timed(table: Table, step: Step) -> dict[str, float]:
    start = last = time.perf_counter()
    seconds: dict[str, float] = {}
    for phase in step(table):
        last, before = time.perf_counter(), last
        seconds[phase] = last - before
    return {**seconds, "step": last - start}


def _set_up(model: str, size: Size, dtype: str) -> Table:
    torch.manual_seed(0)
    recipe = Recipe.from_values(
        {
            "name": "trainer part",
            "output": Path("unused"),
            "student": {"model": model},
            "data": {
                "train": "unused",
                "max_prompt_tokens": MAX_PROMPT_TOKENS,
                "max_response_tokens": size.response_tokens,
            },
            "warmup": {"steps": 0},
            "game": {"steps": 1},
        }
    )
    precision = Precision(HardwareSettings(compute_dtype=dtype))  # pyright: ignore[reportArgumentType]
    codec = TextCodec.from_pretrained(model)
    student = load_student(recipe, precision)
    discriminator = load_discriminator(recipe, student, codec, precision)
    return Table(
        student=student,
        reference=student.frozen_copy(),
        discriminator=discriminator,
        student_optimizer=_optimizer("student", student),
        discriminator_optimizer=_optimizer("discriminator", discriminator),
        groups=_groups(codec, size),
        token_budget=size.tokens_per_micro_batch,
    )


def _optimizer(player: str, module: torch.nn.Module) -> PlayerOptimizer:
    optimizer = PlayerOptimizer(player, module.parameters(), OptimizerSettings())
    optimizer.begin_stage(LearningRateSettings(peak=LEARNING_RATE), 100)
    return optimizer


def _groups(codec: TextCodec, size: Size) -> list[Group]:
    generator = np.random.default_rng(0)

    def response() -> Response:
        ids = generator.integers(5, codec.num_tokens - 5, size.response_tokens)
        return Response(ids.astype(np.int32), is_finished=False)

    chosen = rows(size, 1)
    prompts = codec.encode_chats([row.messages for row in chosen], add_generation_prompt=True)
    return [
        Group(
            EncodedExample(Example(row.messages, row.teacher_response), prompt_ids, response()),
            [response() for _ in range(size.group_size)],
        )
        for row, prompt_ids in zip(chosen, prompts, strict=True)
    ]
