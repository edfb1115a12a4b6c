"""The gates between warm-up and game: is the discriminator able to reward, and is it done?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gad_fast.game.loop import Game
from gad_fast.game.warmup import train_on
from gad_fast.run.health import rising_discriminator, weak_discriminator


def pass_gates(game: Game, measure: Callable[[], Any]) -> None:
    """Trains the discriminator on where the recipe wants it, and tells what speaks against a game.

    Args:
        game: after warm-up.
        measure: validates the players as they are; the game keeps the accuracy.

    Raises:
        HealthError: a gate is shut; a checkpoint is written.
    """
    gate = game.recipe.health.rising_discriminator
    if gate.action == "pause":

        def is_done(index: int) -> bool:
            if index % gate.round_steps:
                return False
            measure()
            return len(game.accuracies) > 1 and not _is_rising(game)

        train_on(game, gate.max_steps, is_done)
        measure()
    settings, accuracies = game.recipe.health, [accuracy for _, accuracy in game.accuracies]
    found = (rising_discriminator(settings, accuracies), _weak(game, accuracies))
    alarms = [alarm for alarm in found if alarm is not None]
    game.recorder.write_alarms(game.steps_done, alarms)
    game.recorder.stop_if_alarmed(game.steps_done, alarms, game.snapshot)


def _is_rising(game: Game) -> bool:
    accuracies = [accuracy for _, accuracy in game.accuracies]
    return rising_discriminator(game.recipe.health, accuracies) is not None


def _weak(game: Game, accuracies: list[float]) -> Any:
    return weak_discriminator(game.recipe.health, accuracies[-1]) if accuracies else None
