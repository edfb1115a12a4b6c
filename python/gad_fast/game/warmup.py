"""Warm-up, and the baseline that is nothing but its imitation."""

from __future__ import annotations

from collections.abc import Callable

from gad_fast.game.loop import Game


def warm_up(game: Game, num_steps: int) -> None:
    """Stage 1: the student imitates the teacher, the discriminator learns on its live rollouts."""
    settings = game.recipe.warmup
    for index in game.begin_stage("warmup", settings, num_steps):
        with game.step() as step:
            step.sample()
            step.train_discriminator()
            if index >= settings.discriminator_only_steps:
                step.imitate()


def train_on(game: Game, num_steps: int, is_done: Callable[[int], bool]) -> None:
    """Trains the discriminator on while the student waits.

    Args:
        game: after warm-up.
        num_steps: the most that are added.
        is_done: asked before each step, with its index; True ends the stage.
    """
    for index in game.begin_stage("discriminator", game.recipe.warmup, num_steps):
        if is_done(index):
            return
        with game.step() as step:
            step.sample()
            step.train_discriminator()


def imitate_only(game: Game, num_steps: int) -> None:
    """SeqKD: the student imitates; nothing is sampled, and there is no discriminator to train."""
    for _ in game.begin_stage("warmup", game.recipe.warmup, num_steps):
        with game.step() as step:
            step.imitate()
