"""The smallest thing that can pass, fail, be skipped or be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]
"""One line of a section's results, ready for JSON. `passes: False` in it fails the case."""

Results = dict[str, Any]
"""What the suite has found so far: its `sections`, by name."""


class Case(NamedTuple):
    """Something to run and to write down."""

    name: str
    run: Callable[[], list[Row]]
    is_optional: bool = False
    """Whether raising means "not available here" rather than a failure: other people's code."""


def rows_of(results: Results, section: str) -> list[Row]:
    """All rows that a section has left, or none where it has not run."""
    cases = results.get("sections", {}).get(section, {}).get("cases", [])
    return [row for case in cases for row in case["rows"]]
