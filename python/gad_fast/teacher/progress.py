"""What a collection shows while it runs: rate, cost, time left and failures."""

from __future__ import annotations

import asyncio
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gad_fast.teacher.tally import Tally

_SECONDS_TO_REFRESH = 0.5
_SECONDS_TO_LINE = 10.0


class ProgressScreen:
    """A bar with figures at the foot of a terminal; elsewhere a line from time to time."""

    def __init__(self, tally: Tally, console: Console | None = None) -> None:
        self._tally = tally
        self.console = console or Console(highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, transient=True
        )
        self._task = self._bar.add_task("", total=tally.num_wanted, completed=tally.num_done)

    def __enter__(self) -> ProgressScreen:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    async def refresh_for_ever(self) -> None:
        """Keeps the figures up to date until it is cancelled."""
        is_terminal = self.console.is_terminal
        while True:
            await asyncio.sleep(_SECONDS_TO_REFRESH if is_terminal else _SECONDS_TO_LINE)
            if is_terminal:
                line, done = describe(self._tally), self._tally.num_done
                self._bar.update(self._task, completed=done, description=line)
            else:
                self.say(
                    f"{self._tally.num_done}/{self._tally.num_wanted}  {describe(self._tally)}"
                )

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, markup=False, soft_wrap=True)


def describe(tally: Tally) -> str:
    """The figures of a tally in one line."""
    parts = [f"{tally.responses_per_second:.1f}/s", f"{tally.used.tokens} tokens"]
    if tally.used.cost:
        parts.append(f"cost {tally.used.cost:.4g}")
    if tally.seconds_left is not None:
        parts.append(f"left {clock(tally.seconds_left)}")
    if tally.failures:
        failures = ", ".join(f"{kind} x{count}" for kind, count in tally.failures.most_common())
        parts.append(f"failed attempts {failures}")
    if tally.num_rejected or tally.num_given_up:
        parts.append(f"rejected {tally.num_rejected}, given up {tally.num_given_up}")
    if tally.flags:
        parts.append(", ".join(f"{flag} {count}" for flag, count in tally.flags.most_common()))
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """A time span as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
