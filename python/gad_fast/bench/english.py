"""English to measure with, wherever Python is: sentences of its own manual."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

_SHORTEST_SENTENCE = 20


def lines() -> list[str]:
    """The lines of the manual that are not empty, each with its end."""
    return [f"{line}\n" for line in _manual().splitlines() if line.strip()]


def sentences() -> list[str]:
    """The manual's sentences, white space made one space."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?:])\s+", _manual()))
    return [part for part in parts if len(part) >= _SHORTEST_SENTENCE]


def passage(source: list[str], generator: random.Random, num_characters: int) -> str:
    """Items of `source` in runs of three from random places, until there are enough characters."""
    parts: list[str] = []
    while sum(map(len, parts)) < num_characters:
        start = generator.randrange(len(source))
        parts += source[start : start + 3]
    return "".join(parts)[:num_characters]


def _manual() -> str:
    return "\n".join(topics[name] for name in sorted(topics))
