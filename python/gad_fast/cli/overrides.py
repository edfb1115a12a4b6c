"""Flags that give a key of a recipe another value."""

from __future__ import annotations

import functools
import itertools
import tomllib
from typing import Any

from gad_fast.errors import ConfigError


def overrides(flags: list[str]) -> dict[str, Any]:
    """Nested values of `--a.b value` and `--a.b=value` flags.

    They are validated with the recipe's own, so that a mistake reads the same in both places.
    """
    nested: dict[str, Any] = {}
    words = [part for flag in flags for part in _split(flag)]
    for flag, value in itertools.zip_longest(words[::2], words[1::2]):
        if not flag.startswith("--") or value is None:
            raise ConfigError(f"flags come as --key value or --key=value, got {' '.join(flags)!r}")
        *sections, key = flag.removeprefix("--").replace("-", "_").split(".")
        section = functools.reduce(lambda at, name: at.setdefault(name, {}), sections, nested)
        section[key] = _value(value)
    return nested


def _split(flag: str) -> list[str]:
    return flag.split("=", maxsplit=1) if flag.startswith("--") else [flag]


def _value(text: str) -> Any:
    """A value as a recipe file would have it; what is no TOML value is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
