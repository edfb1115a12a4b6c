"""The game and its loop: sample, judge, learn, on both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gad_fast import kernels
from gad_fast.config import Recipe, StageSettings
from gad_fast.game.measures import length_correlation, repetition
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.state import capture, frozen_reference
from gad_fast.game.steps import (
    Metrics,
    imitate,
    length_metrics,
    train_discriminator,
    train_student,
)
from gad_fast.models.discriminator import Discriminator
from gad_fast.models.student import Student
from gad_fast.records import EncodedExample, Group
from gad_fast.rollout.engine import ModuleWeights, RolloutEngine, Sampling
from gad_fast.rollout.groups import GroupPlan, GroupsError, sample_groups
from gad_fast.rollout.probe import probe
from gad_fast.run.checkpoint import Snapshot
from gad_fast.run.health import Health
from gad_fast.run.recorder import Recorder
from gad_fast.run.stopwatch import Stopwatch
from gad_fast.text import TextCodec

Figures = dict[str, Any]
"""A validation, fit for JSON."""

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as the official code does."""


@dataclass(frozen=True, slots=True)
class Opponent:
    """The discriminator with what it learns with."""

    discriminator: Discriminator
    optimizer: PlayerOptimizer


@dataclass
class Game:
    """Both players, what they learn with, and where the run stands."""

    recipe: Recipe
    codec: TextCodec
    student: Student
    student_optimizer: PlayerOptimizer
    opponent: Opponent | None
    """None in SeqKD, which plays against nobody."""
    engine: RolloutEngine
    batches: Iterator[list[EncodedExample]]
    recorder: Recorder
    health: Health
    data_digest: str
    """Of all prompts and teacher responses: a run goes on with the same data only."""
    validate: Callable[[Game], Figures] | None = None
    """Called every `run.validate_every` steps; writes its own line."""
    steps_done: int = 0
    weight_version: int = 0
    stage: str = ""
    stage_start: int = 0
    """Steps that were done when the stage began."""
    updates_in_stage: dict[str, int] = field(default_factory=dict[str, int])
    """By player, as they were when a run goes on within a stage."""
    validations: dict[str, Figures] = field(default_factory=dict[str, Figures])
    """By moment of the run."""
    newest_validation: tuple[int, Figures] | None = None
    """With its step."""
    accuracies: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Step and held-out pair accuracy of every validation since the first step."""

    @property
    def optimizers(self) -> dict[str, PlayerOptimizer]:
        """By player."""
        own = {"student": self.student_optimizer}
        return own if self.opponent is None else {**own, "discriminator": self.opponent.optimizer}

    def begin_stage(self, name: str, settings: StageSettings, num_steps: int) -> range:
        """Begins a stage, or goes on with it; gives the indices of the steps that are left."""
        if self.stage != name:
            self.stage, self.stage_start, self.updates_in_stage = name, self.steps_done, {}
        rates = {"student": settings.student, "discriminator": settings.discriminator}
        for player, optimizer in self.optimizers.items():
            done = self.updates_in_stage.get(player, 0)
            optimizer.begin_stage(rates[player], num_steps, done)
        done = self.steps_done - self.stage_start
        self.recorder.begin_stage(name, num_steps=num_steps, start=self.stage_start, done=done)
        return range(done, num_steps)

    @contextlib.contextmanager
    def step(self) -> Generator[Step]:
        """One step; what its verbs measured is written down when it ends."""
        step = Step(self, next(self.batches))
        yield step
        self.steps_done += 1
        self._finish(step)

    def snapshot(self) -> Snapshot:
        """A copy of all that the rest of the run depends on."""
        return capture(self)

    def apply_pauses(self) -> None:
        """Pauses the players that an alarm wants to be paused."""
        self.student_optimizer.is_paused = self.health.is_paused("student")
        if self.opponent is not None:
            self.opponent.optimizer.is_paused = self.health.is_paused("discriminator")

    def note_validation(self, figures: Figures) -> None:
        """Keeps a validation of the players as they are."""
        self.newest_validation = (self.steps_done, figures)
        if self.steps_done and figures["d_acc"] is not None:
            self.accuracies.append((self.steps_done, figures["d_acc"]))

    def validation_now(self) -> Figures | None:
        """The validation of the players as they are, if there was one."""
        newest = self.newest_validation
        return newest[1] if newest is not None and newest[0] == self.steps_done else None

    def _finish(self, step: Step) -> None:
        metrics, settings = step.summary(), self.recipe.run
        self.recorder.write_step(self.steps_done, metrics, step.samples())
        alarms = self.health.observe(self.steps_done, self.stage, metrics)
        self.recorder.write_alarms(self.steps_done, alarms)
        self.apply_pauses()
        if (
            self.validate
            and settings.validate_every
            and not self.steps_done % settings.validate_every
        ):
            self.validate(self)
        self.recorder.stop_if_alarmed(self.steps_done, alarms, self.snapshot)
        is_candidate = settings.keep_best > 0 and self.validation_now() is not None
        self.recorder.end_step(self.steps_done, self.snapshot, is_wanted=is_candidate)


def plan_of(recipe: Recipe, *, group_size: int, seed: int, version: int) -> GroupPlan:
    """How the rollouts of a recipe are drawn."""
    settings = recipe.rollout
    sampling = Sampling(settings.temperature, recipe.data.max_response_tokens)
    return GroupPlan(group_size, sampling, seed, version, settings.timeout_seconds)


@dataclass
class Step:
    """The verbs of one step, timed, with the recipe's settings."""

    game: Game
    prompts: list[EncodedExample]
    groups: list[Group] = field(default_factory=list[Group])
    metrics: Metrics = field(default_factory=dict[str, float])
    scores: Tensor | None = None
    _watch: Stopwatch = field(default_factory=Stopwatch)

    def sample(self) -> None:
        """Samples a group of rollouts for each prompt."""
        game = self.game
        with self._watch.phase("rollout"):
            self.groups = self._journalled() or self._sampled()
        self.metrics |= length_metrics(self.groups) | {"repetition": repetition(self.groups)}
        self._probe()
        # Nothing has changed since the step before, so the run can be left here as well.
        game.recorder.stop_if_asked(game.steps_done, game.snapshot)

    def train_discriminator(self) -> Tensor:
        """Updates the discriminator; returns the rollouts' scores before that, Float [B, G]."""
        opponent = self.game.opponent
        assert opponent is not None
        with self._watch.phase("discriminator"):
            self.scores, metrics = train_discriminator(
                opponent.discriminator,
                opponent.optimizer,
                self.groups,
                token_budget=self.game.recipe.batch.tokens_per_micro_batch,
            )
        correlation = length_correlation(self.scores, self.groups)
        self.metrics |= metrics | {"length_correlation": correlation}
        return self.scores

    def imitate(self) -> None:
        """Updates the student on the teacher's responses."""
        game = self.game
        with self._watch.phase("student"):
            self.metrics |= imitate(
                game.student,
                game.student_optimizer,
                self.prompts,
                token_budget=game.recipe.batch.tokens_per_micro_batch,
            )
        self._sync_weights()

    def train_student(self, reference: Student | None, advantages: Tensor) -> None:
        """Updates the student on its rollouts' advantages, Float [B, G]."""
        game = self.game
        with self._watch.phase("student"):
            self.metrics |= train_student(
                game.student,
                reference,
                game.student_optimizer,
                self.groups,
                advantages,
                kl_coef=game.recipe.game.kl_coef,
                temperature=game.recipe.rollout.temperature,
                token_budget=game.recipe.batch.tokens_per_micro_batch,
            )
        self._sync_weights()

    def summary(self) -> Metrics:
        """The step's line of metrics.jsonl."""
        seconds = {f"{phase}_seconds": s for phase, s in self._watch.seconds.items()}
        return {
            **self.metrics,
            "weight_version": self.game.weight_version,
            "tokens_per_second": self._num_tokens() / self._watch.total,
            **seconds,
            "step_seconds": self._watch.total,
        }

    def samples(self) -> list[dict[str, Any]]:
        """The step's groups as text, for samples.jsonl."""
        groups = self.groups[: self.game.recipe.run.samples_per_step]
        return [self._sample(index, group) for index, group in enumerate(groups)]

    def _sample(self, index: int, group: Group) -> dict[str, Any]:
        scores = None if self.scores is None else self.scores[index].tolist()
        return {
            "messages": group.prompt.example.messages,
            "teacher_response": group.prompt.example.teacher_response,
            "rollouts": self.game.codec.decode_responses(group.rollouts),
            "scores": scores,
        }

    def _journalled(self) -> list[Group] | None:
        """The step's groups, if a run that was cut off had sampled all of them."""
        game = self.game
        found = game.recorder.journal.load(game.steps_done + 1, self.prompts)
        if len(found) < len(self.prompts):
            return None
        return [found[index] for index in range(len(self.prompts))]

    def _sampled(self) -> list[Group]:
        game, number = self.game, self.game.steps_done + 1
        plan = plan_of(
            game.recipe,
            group_size=game.recipe.rollout.group_size,
            seed=game.recipe.seed * 1_000_003 + game.steps_done,
            version=game.weight_version,
        )
        game.student.activate()
        journal = game.recorder.journal
        kept = journal.load_kept(number, self.prompts)
        if kept:
            game.recorder.display.say(
                f"step {number} goes on with {len(kept)} of {len(self.prompts)} groups, which its "
                f"engine had finished before it failed"
            )
        try:
            groups = sample_groups(game.engine, self.prompts, plan, kept=kept)
        except GroupsError as error:
            journal.keep(number, {found.index: found.group for found in error.found})
            raise GroupsError(f"no rollouts in step {number}: {error}", error.found) from error
        journal.discard(number)
        journal.append(number, dict(enumerate(groups)))
        return groups

    def _num_tokens(self) -> int:
        """Response tokens of the step: sampled, or imitated when nothing was sampled."""
        if self.groups:
            return sum(len(rollout) for group in self.groups for rollout in group.rollouts)
        return sum(len(prompt.teacher) for prompt in self.prompts)

    def _probe(self) -> None:
        """Asks, when it is due, whether the engine samples from the student."""
        game = self.game
        settings = game.recipe.rollout
        if game.engine.caps.in_place and game.steps_done % settings.probe_every:
            return
        with self._watch.phase("probe"):
            gap = probe(
                game.student,
                self.groups,
                temperature=settings.temperature,
                token_budget=game.recipe.batch.tokens_per_micro_batch,
            )
        if gap is not None:
            self.metrics["engine_gap"] = gap.mean

    def _sync_weights(self) -> None:
        game = self.game
        if game.student_optimizer.is_paused:
            return
        game.weight_version += 1
        with self._watch.phase("sync"):
            game.engine.sync_weights(ModuleWeights(game.student.model), game.weight_version)


def play(game: Game, num_steps: int) -> None:
    """Stage 2: the discriminator's scores are the student's rewards."""
    settings = game.recipe.game
    is_new = game.stage != "game"
    steps = game.begin_stage("game", settings, num_steps)
    if is_new and settings.reset_optimizer:
        for optimizer in game.optimizers.values():
            optimizer.forget()
    # The student that warm-up has made is what the KL term holds on to.
    has_reference = settings.kl_coef > 0 and len(steps) > 0
    reference = frozen_reference(game, is_new=is_new) if has_reference else None
    for _ in steps:
        with game.step() as step:
            step.sample()
            rewards = step.train_discriminator()
            advantages = kernels.group_advantages(
                rewards,
                scale=settings.advantage_scale,
                std_floor=settings.std_floor,
                eps=STD_EPSILON,
            )
            step.train_student(reference, advantages)
