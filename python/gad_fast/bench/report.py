"""What a benchmark found: a table for people, a file for the record."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from gad_fast.bench.machine import commit, hardware, versions
from gad_fast.errors import ConfigError

Of = Literal["speed", "time", "memory", "bytes"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case of ours against one peer."""

    case: str
    """What is measured, with its own figure where it has one."""
    peer: str
    """What it is measured against."""
    ratios: Sequence[float]
    """Ours over the peer's, one a turn."""
    of: Of = "speed"
    """What the ratio is of. More speed is better, less of all else."""
    goal: float | None = None
    """The bound that the project set itself, or None."""

    @property
    def median(self) -> float:
        """The ratio that is reported."""
        return statistics.median(self.ratios)

    @property
    def is_met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.of == "speed" else self.median <= self.goal


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark's result."""

    name: str
    question: str
    is_quick: bool
    """Whether it ran on sizes too small for the goals."""
    settings: dict[str, Any]
    """Sizes, seed, threads: what it takes to run it again."""
    comparisons: list[Comparison]
    samples: Any
    """Every measurement, turn by turn, as JSON."""
    remarks: list[str] = field(default_factory=list[str])
    """Lines for people: peers that are not installed, figures without a peer."""


def check_output(path: Path) -> None:
    """Refuses a file that could not be written, before minutes of work.

    Raises:
        ConfigError: it is no `.json` file, or its folder is not there or not writable.
    """
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"--output must name a .json file, got {path}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--output {path}: its folder is not there or cannot be written (make it)"
        )


def show(report: Report, console: Console) -> None:
    """Prints the question, a table of ratios with their range over the turns, and the remarks."""
    console.print(report.question, markup=False)
    table = Table("case", "against", "ratio", "range", "goal")
    for row in report.comparisons:
        low, high = min(row.ratios), max(row.ratios)
        goal = "" if report.is_quick else _goal(row)
        ratio = f"x{row.median:.3g}" if row.of == "speed" else f"{row.median:.3g} of {row.of}"
        table.add_row(row.case, row.peer, ratio, f"{low:.3g} to {high:.3g}", goal)
    console.print(table)
    if report.is_quick:
        console.print("a quick run, too small for the goals")
    for remark in report.remarks:
        console.print(remark, markup=False)


def write(report: Report, path: Path) -> None:
    """Writes the result with machine, versions and commit; the file appears when it is whole."""
    comparisons = [
        {**asdict(row), "median": row.median, "is_met": None if report.is_quick else row.is_met}
        for row in report.comparisons
    ]
    record = {
        "benchmark": report.name,
        "question": report.question,
        "is_quick": report.is_quick,
        "hardware": hardware(),
        "versions": versions(),
        **commit(),
        "settings": report.settings,
        "comparisons": comparisons,
        "remarks": report.remarks,
        "samples": report.samples,
    }
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _goal(row: Comparison) -> str:
    if row.goal is None:
        return ""
    sign = ">=" if row.of == "speed" else "<="
    return f"{sign} {row.goal:g}{'' if row.is_met else ', missed'}"
