"""The command line: parses, calls the library, and turns errors into one line and an exit code."""

from __future__ import annotations

import functools
import itertools
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gad_fast.config import Recipe
from gad_fast.errors import CacheCorruptError, ConfigError, GadFastError

HELP = """\
usage: gad-fast COMMAND ...

Distils a language model from a teacher that can only be asked for text.

commands:
  train RECIPE.toml [--a.b value ...] [--dry-run]   play the game that a recipe describes
  cache info CACHE                                  what a cache of teacher responses holds
  cache verify CACHE                                check every row of it
  cache export CACHE OUTPUT                         write it to a .jsonl or .parquet file
  cache import CACHE SOURCE                         bring such a file into it

`gad-fast train --help` lists what a recipe may say.
"""


@dataclass(frozen=True)
class Train:
    """Distils a student as a recipe says; any key of the recipe can be given another value."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE.toml")]
    """The recipe file; it comes first."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved recipe and the sizes that follow from it; train nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(_dispatch(words))
    except GadFastError as error:
        print(f"gad-fast: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"gad-fast: {error or 'interrupted'}", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def _dispatch(words: list[str]) -> int:
    match words:
        case [] | ["-h" | "--help"]:
            print(HELP, end="")  # noqa: T201
        case ["train", *rest]:
            _train(rest)
        case ["cache", *rest]:
            _cache(rest)
        case _:
            unknown = words[0]
            raise ConfigError(
                f"unknown command {unknown!r}, allowed: train, cache (see gad-fast --help)"
            )
    return 0


def _train(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        tyro.cli(Train, prog="gad-fast train", args=["--help"])
    if not words or words[0].startswith("-"):
        raise ConfigError("train needs a recipe: gad-fast train RECIPE.toml [--a.b value ...]")
    path, *flags = words
    recipe = Recipe.from_toml(path, overrides=_overrides([f for f in flags if f != "--dry-run"]))
    # Imported here: torch takes seconds, and neither help nor a mistaken recipe needs it.
    from gad_fast.training import dry_run, train

    if "--dry-run" in flags:
        dry_run(recipe)
    else:
        train(recipe)


def _cache(words: list[str]) -> None:
    # Imported here: reading data files takes pyarrow, which help does not need.
    from gad_fast.teacher import cache_command

    match words:
        case ["info", cache]:
            for name, value in asdict(cache_command.info(Path(cache))).items():
                print(f"{name.replace('_', ' '):16} {value}")  # noqa: T201
        case ["verify", cache]:
            verification = cache_command.verify(Path(cache))
            for problem in verification.problems:
                print(problem)  # noqa: T201
            if verification.problems:
                raise CacheCorruptError(
                    f"{len(verification.problems)} problems in {verification.num_rows} rows of "
                    f"{cache} (export what can be read, and import it into a new cache)"
                )
            print(f"{verification.num_rows} rows, all as they were stored")  # noqa: T201
        case ["export", cache, output]:
            print(cache_command.export(Path(cache), Path(output)))  # noqa: T201
        case ["import", cache, source]:
            print(cache_command.import_(Path(cache), Path(source)))  # noqa: T201
        case _:
            raise ConfigError(
                f"cache takes info CACHE, verify CACHE, export CACHE OUTPUT or import CACHE "
                f"SOURCE, got {' '.join(words) or 'nothing'}"
            )


def _overrides(flags: list[str]) -> dict[str, Any]:
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
