"""Keeps the record of a run: a line a step, samples, checkpoints, and the user's wish to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gad_fast.config import RunSettings
from gad_fast.errors import Interrupted
from gad_fast.run.checkpoint import Writers, checkpoint_folder, prune, write_folder
from gad_fast.run.display import Display
from gad_fast.run.folder import RunFolder
from gad_fast.run.interrupt import InterruptGuard


class Recorder:
    """Called at the end of every step.

    Args:
        folder: the run folder.
        display: the screen.
        settings: how often.
        writers: what a checkpoint consists of.
    """

    def __init__(
        self, folder: RunFolder, display: Display, settings: RunSettings, writers: Writers
    ) -> None:
        self.folder = folder
        self.display = display
        self._settings = settings
        self.writers = writers
        self._guard = InterruptGuard(
            lambda: display.say("stopping after this step; Ctrl-C again leaves at once")
        )
        self._stage, self._stage_start, self._last_checkpoint = "", 0, 0

    def __enter__(self) -> Recorder:
        self.display.__enter__()
        self._guard.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._guard.__exit__(*exception)
        self.display.__exit__(*exception)
        self.folder.close()

    def begin_stage(self, stage: str, *, num_steps: int, steps_done: int) -> None:
        """Announces a stage of `num_steps` steps after `steps_done` steps of the run."""
        self._stage, self._stage_start = stage, steps_done
        self.display.begin_stage(stage, num_steps)

    def finish_step(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes a step down; checkpoints when it is time to.

        Raises:
            Interrupted: the user asked to stop; a checkpoint of this step is written.
        """
        head = {"step": step, "stage": self._stage}
        self.folder.write_metrics({**head, **metrics})
        for sample in samples[: self._settings.samples_per_step]:
            self.folder.write_sample({**head, **sample})
        self.display.finish_step(step - self._stage_start, metrics, self._settings.log_every)
        if self._guard.is_requested or step % self._settings.checkpoint_every == 0:
            self.checkpoint(step)
        self.stop_if_asked(step)

    def stop_if_asked(self, step: int) -> None:
        """Raises Interrupted when the user has asked to stop, after a checkpoint of `step`."""
        if self._guard.is_requested:
            self.checkpoint(step)
            raise Interrupted(f"stopped at step {step}; checkpoint in {self._checkpoint(step)}")

    def checkpoint(self, step: int) -> None:
        """Writes the checkpoint of a step, if that is not there yet, and removes old ones."""
        if self._checkpoint(step).exists():
            return
        write_folder(self._checkpoint(step), self.writers, {"step": step, "stage": self._stage})
        prune(self.folder.path, self._settings.keep_checkpoints)

    def _checkpoint(self, step: int) -> Any:
        return checkpoint_folder(self.folder.path, step)
