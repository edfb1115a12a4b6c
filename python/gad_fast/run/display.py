"""What a user sees: the plan, a line a step with the time left, and tables of results."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_COLUMNS = {
    "imitation_loss": ("nll", "{:.3f}"),
    "policy_loss": ("policy", "{:+.4f}"),
    "kl": ("kl", "{:.4f}"),
    "discriminator_loss": ("d_loss", "{:.3f}"),
    "d_acc": ("d_acc", "{:.2f}"),
    "score_gap": ("gap", "{:+.2f}"),
    "reward_std": ("r_std", "{:.2f}"),
    "rollout_length": ("length", "{:.0f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
}
"""Metric to its short name and format, in the order of the screen."""


class Display:
    """A progress bar at the foot of the screen, lines above it; plain lines without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, stderr=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin_stage(self, name: str, num_steps: int, num_done: int = 0) -> None:
        """Restarts the progress bar for a stage of which `num_done` steps are done."""
        self._progress.reset(self._task, description=name, total=num_steps, completed=num_done)
        self._name, self._num_steps, self._num_before, self._seconds = (
            name,
            num_steps,
            num_done,
            0.0,
        )

    def finish_step(self, step: int, metrics: Mapping[str, float], log_every: int) -> None:
        """Moves the bar by a step, and prints the step's line if it is the turn of one.

        Args:
            step: number of the step within its stage, from 1.
            metrics: the step's line of metrics.jsonl.
            log_every: steps from line to line; the last step of a stage always has one.
        """
        self._progress.advance(self._task)
        self._seconds += metrics["step_seconds"]
        if step % log_every == 0 or step == self._num_steps:
            left = self._seconds / (step - self._num_before) * (self._num_steps - step)
            head = f"{self._name} {step:>{len(str(self._num_steps))}}/{self._num_steps}"
            self.say(f"{head}  {_line(metrics)}  left {_clock(left)}")

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """Prints a table; the first column is left-aligned, numbers right."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def _line(metrics: Mapping[str, float]) -> str:
    shown = (
        f"{name} {form.format(metrics[key])}"
        for key, (name, form) in _COLUMNS.items()
        if key in metrics
    )
    return "  ".join(shown)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
