"""The state of a game: out into a checkpoint, and back from one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from gad_fast.errors import CheckpointError
from gad_fast.models.student import Student
from gad_fast.rollout.engine import ModuleWeights
from gad_fast.run.checkpoint import Snapshot, read_state
from gad_fast.run.complete import problem
from gad_fast.run.tensors import copy_optimizer, copy_random, read_optimizer, restore_random

if TYPE_CHECKING:
    from gad_fast.game.loop import Game

REFERENCE = "reference"
"""Folder of the run with the student after warm-up, which the KL term holds on to."""
_MOMENTS = 2
"""Tensors that AdamW keeps beside each weight."""


def capture(game: Game) -> Snapshot:
    """Copies all that the rest of a run depends on, at the end of a step."""
    writers = {
        "student": game.student.copy_for_saving(game.codec),
        "student_optimizer": copy_optimizer(game.student_optimizer.state_dict()),
        "random": copy_random(),
    }
    if game.opponent is not None:
        writers["discriminator"] = game.opponent.discriminator.copy_for_saving()
        writers["discriminator_optimizer"] = copy_optimizer(game.opponent.optimizer.state_dict())
    state = copy.deepcopy(_state(game))  # a thread writes it while the game goes on
    return Snapshot(game.steps_done, writers, state, checkpoint_bytes(game))


def restore(game: Game, folder: Path) -> None:
    """Sets a new game to the state of a checkpoint.

    The schedules are set when the stage begins again: see `Game.begin_stage`.

    Raises:
        CheckpointError: its files are whole, but not those of such a game.
    """
    try:
        _restore_tensors(game, folder)
        _restore_values(game, read_state(folder))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read: {reason} (remove it to go on from the one before)"
        ) from error
    game.engine.sync_weights(ModuleWeights(game.student.model), game.weight_version)


def frozen_reference(game: Game, *, is_new: bool) -> Student:
    """The student after warm-up: as it is now, or as the run's folder has kept it.

    Raises:
        CheckpointError: the folder's is not what was written.
    """
    folder = game.recipe.output / REFERENCE
    reference = game.student.frozen_copy()
    if is_new:
        writers = {"student": game.student.copy_for_saving(game.codec)}
        game.recorder.write_beside(REFERENCE, writers)
        return reference
    reason = problem(folder)
    if reason is not None:
        raise CheckpointError(
            f"{folder}, which the KL term needs, cannot be used: {reason} (put it back, or remove "
            f"the checkpoints of the game to go on from warm-up)"
        )
    reference.load_weights(folder / "student")
    return reference


def checkpoint_bytes(game: Game) -> int:
    """About what a checkpoint of the game takes on the disk, in bytes."""
    parameters = list(game.student.trainable_parameters())
    if game.opponent is not None:
        parameters += game.opponent.discriminator.trainable_parameters()
    return sum(p.nbytes * (1 + (_MOMENTS if p.requires_grad else 0)) for p in parameters)


def _restore_tensors(game: Game, folder: Path) -> None:
    game.student.load_weights(folder / "student")
    game.student_optimizer.load_state_dict(read_optimizer(folder / "student_optimizer"))
    if game.opponent is not None:
        moments = read_optimizer(folder / "discriminator_optimizer")
        game.opponent.discriminator.load_weights(folder / "discriminator")
        game.opponent.optimizer.load_state_dict(moments)
    restore_random(folder / "random")


def _restore_values(game: Game, state: dict[str, Any]) -> None:
    for _ in range(state["batches_taken"]):
        next(game.batches)
    game.steps_done, game.weight_version = state["step"], state["weight_version"]
    game.stage, game.stage_start = state["stage"], state["stage_start"]
    game.updates_in_stage = state["updates_in_stage"]
    game.validations = state["validations"]
    if state["validation"] is not None:
        game.newest_validation = (game.steps_done, state["validation"])
    game.accuracies = [(step, accuracy) for step, accuracy in state["accuracies"]]
    game.health.restore(state["health"])
    game.apply_pauses()


def _state(game: Game) -> dict[str, Any]:
    return {
        "step": game.steps_done,
        "stage": game.stage,
        "stage_start": game.stage_start,
        "updates_in_stage": {name: o.num_updates for name, o in game.optimizers.items()},
        "weight_version": game.weight_version,
        "batches_taken": game.steps_done,
        "data": game.data_digest,
        "validations": game.validations,
        "validation": game.validation_now(),
        "accuracies": game.accuracies,
        "health": game.health.state(),
        "logs": game.recorder.folder.synced_sizes(),
    }
