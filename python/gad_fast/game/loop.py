"""The game and its loop: sample, judge, learn, on both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gad_fast import kernels
from gad_fast.config import Recipe, StageSettings
from gad_fast.game.optim import PlayerOptimizer
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
from gad_fast.run.recorder import Recorder
from gad_fast.run.stopwatch import Stopwatch
from gad_fast.text import TextCodec

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
    steps_done: int = 0
    weight_version: int = 0

    def begin_stage(self, name: str, settings: StageSettings, num_steps: int) -> None:
        """Starts the schedules of a stage, and its progress bar."""
        self.student_optimizer.begin_stage(settings.student, num_steps)
        if self.opponent is not None:
            self.opponent.optimizer.begin_stage(settings.discriminator, num_steps)
        self.recorder.begin_stage(name, num_steps=num_steps, steps_done=self.steps_done)

    @contextlib.contextmanager
    def step(self) -> Generator[Step]:
        """One step; what its verbs measured is written down when it ends."""
        step = Step(self, next(self.batches))
        yield step
        self.steps_done += 1
        self.recorder.finish_step(self.steps_done, step.summary(), step.samples())


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
        plan = plan_of(
            game.recipe,
            group_size=game.recipe.rollout.group_size,
            seed=game.recipe.seed * 1_000_003 + game.steps_done,
            version=game.weight_version,
        )
        with self._watch.phase("rollout"):
            try:
                self.groups = sample_groups(game.engine, self.prompts, plan)
            except GroupsError as error:
                message = f"no rollouts in step {game.steps_done + 1}: {error}"
                raise GroupsError(message, error.found) from error
        self.metrics |= length_metrics(self.groups)
        self._probe()

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
        self.metrics |= metrics
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
        game.weight_version += 1
        with self._watch.phase("sync"):
            game.engine.sync_weights(ModuleWeights(game.student.model), game.weight_version)


def play(game: Game, num_steps: int) -> None:
    """Stage 2: the discriminator's scores are the student's rewards."""
    settings = game.recipe.game
    game.begin_stage("game", settings, num_steps)
    # The student that warm-up has made is what the KL term holds on to.
    reference = game.student.frozen_copy() if settings.kl_coef and num_steps else None
    for _ in range(num_steps):
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
