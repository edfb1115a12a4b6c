"""Keeps the record of a run: a line a step, samples, checkpoints, and the user's wish to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gad_fast.config import RunSettings
from gad_fast.errors import HealthError, Interrupted
from gad_fast.run.checkpoint import Checkpoints, Snapshot, checkpoint_folder
from gad_fast.run.complete import Writers, write_folder
from gad_fast.run.display import Display
from gad_fast.run.folder import RunFolder
from gad_fast.run.health import Alarm
from gad_fast.run.interrupt import InterruptGuard
from gad_fast.run.journal import Journal

Metrics = Mapping[str, float]
TakeSnapshot = Callable[[], Snapshot]


class Recorder:
    """Called at the end of every step.

    Args:
        folder: the run folder.
        display: the screen.
        settings: how often.
    """

    def __init__(self, folder: RunFolder, display: Display, settings: RunSettings) -> None:
        self.folder = folder
        self.display = display
        self.journal = Journal(folder.path)
        self._settings = settings
        self._checkpoints = Checkpoints(folder.path, settings, self.journal.forget)
        self._guard = InterruptGuard(
            lambda: display.say("stopping after this step; once more leaves at once"),
            grace_seconds=settings.grace_seconds,
        )
        self._stage, self._stage_start = "", 0

    def __enter__(self) -> Recorder:
        self.display.__enter__()
        self._guard.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._guard.__exit__(*exception)
        self._checkpoints.saver.close()
        self.display.__exit__(*exception)
        self.folder.close()

    def begin_stage(self, stage: str, *, num_steps: int, start: int, done: int) -> None:
        """Announces a stage of `num_steps` steps that began after step `start`; `done` are done."""
        self._stage, self._stage_start = stage, start
        self.display.begin_stage(stage, num_steps, done)

    def write_step(self, step: int, metrics: Metrics, samples: Sequence[Mapping[str, Any]]) -> None:
        """Writes a step down."""
        head = {"step": step, "stage": self._stage}
        self.folder.write_metrics({**head, **metrics})
        for sample in samples[: self._settings.samples_per_step]:
            self.folder.write_sample({**head, **sample})
        self.display.finish_step(step - self._stage_start, metrics, self._settings.log_every)

    def write_alarms(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Writes alarms down, and tells them."""
        for alarm in alarms:
            values = {"alarm": alarm.name, "value": alarm.value, "action": alarm.action}
            self.folder.write_metrics({"step": step, "stage": "health", **values})
            self.display.say(f"{alarm.action}: {alarm}")

    def end_step(self, step: int, snapshot: TakeSnapshot, *, is_wanted: bool = False) -> None:
        """Checkpoints when it is time to, or `is_wanted`.

        Raises:
            Interrupted: the user asked to stop; a checkpoint of this step is written.
            CheckpointError: a checkpoint, maybe the one before, could not be written.
        """
        self._checkpoints.saver.check()
        if is_wanted or self._checkpoints.is_due(step):
            self._checkpoints.save(snapshot())
        self.stop_if_asked(step, snapshot)

    def stop_if_asked(self, step: int, snapshot: TakeSnapshot) -> None:
        """Raises Interrupted when the user has asked to stop, after a checkpoint of `step`."""
        if self._guard.is_requested:
            self._guard.stop_clock()
            self.checkpoint(snapshot)
            where = checkpoint_folder(self.folder.path, step)
            raise Interrupted(
                f"stopped at step {step}; checkpoint in {where} (start again to go on)"
            )

    def stop_if_alarmed(self, step: int, alarms: Sequence[Alarm], snapshot: TakeSnapshot) -> None:
        """Raises HealthError when an alarm's action is `stop`, after a checkpoint of `step`."""
        for alarm in alarms:
            if alarm.action == "stop":
                self.checkpoint(snapshot)
                raise HealthError(
                    f"stopped at step {step}, {alarm} (to go on nevertheless, set "
                    f"--health.{alarm.name}.action warn)"
                )

    def checkpoint(self, snapshot: TakeSnapshot) -> None:
        """Writes a checkpoint; returns when it is on the disk."""
        self._checkpoints.save(snapshot())
        self._checkpoints.saver.wait()

    def write_beside(self, name: str, writers: Writers) -> None:
        """Starts to write a complete folder of the run that belongs to no one checkpoint.

        Later checkpoints are written after it.
        """
        target = self.folder.path / name
        self._checkpoints.saver.submit(lambda: write_folder(target, writers))

    def wait(self) -> None:
        """Returns when all that was to be written is on the disk."""
        self._checkpoints.saver.wait()
