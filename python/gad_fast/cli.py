"""The command line: parses, calls the library, and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gad_fast.config import Recipe
from gad_fast.errors import ConfigError, GadFastError

HELP = """\
usage: gad-fast COMMAND ...

Distils a language model from a teacher that can only be asked for text.

commands:
  train RECIPE.toml [--a.b value ...] [--dry-run]   play the game that a recipe describes

`gad-fast COMMAND --help` lists what a command takes.
"""


@dataclass(frozen=True)
class Train:
    """Distils a student as a recipe says; any key of the recipe can be given another value."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE.toml")]
    """The recipe file."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: bool = False
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
            _train(_parse_train(rest))
        case _:
            unknown = words[0]
            raise ConfigError(f"unknown command {unknown!r}, allowed: train (see gad-fast --help)")
    return 0


def _parse_train(words: list[str]) -> Train:
    """The recipe file gives the defaults that the flags then override."""
    if words and not words[0].startswith("-"):
        default = Train(Path(words[0]), Recipe.from_toml(words[0]))
        return tyro.cli(Train, prog="gad-fast train", args=words, default=default)
    return tyro.cli(Train, prog="gad-fast train", args=words)


def _train(command: Train) -> None:
    # Imported here: torch takes seconds, and the help needs none of it.
    from gad_fast.training import dry_run, train

    if command.dry_run:
        dry_run(command.recipe)
    else:
        train(command.recipe)
