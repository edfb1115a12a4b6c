"""Warm-up, and the baseline that is nothing but its imitation."""

from __future__ import annotations

from gad_fast.game.loop import Game


def warm_up(game: Game, num_steps: int) -> None:
    """Stage 1: the student imitates the teacher, the discriminator learns on its live rollouts."""
    settings = game.recipe.warmup
    game.begin_stage("warmup", settings, num_steps)
    for index in range(num_steps):
        with game.step() as step:
            step.sample()
            step.train_discriminator()
            if index >= settings.discriminator_only_steps:
                step.imitate()


def imitate_only(game: Game, num_steps: int) -> None:
    """SeqKD: the student imitates; nothing is sampled, and there is no discriminator to train."""
    game.begin_stage("warmup", game.recipe.warmup, num_steps)
    for _ in range(num_steps):
        with game.step() as step:
            step.imitate()
