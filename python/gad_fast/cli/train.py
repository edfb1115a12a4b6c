"""`gad-fast train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gad_fast.cli.overrides import overrides
from gad_fast.config import Recipe
from gad_fast.errors import ConfigError


@dataclass(frozen=True)
class Train:
    """Distils a student as a recipe says; any key of the recipe can be given another value."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE.toml")]
    """The recipe file; it comes first."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved recipe and the sizes that follow from it; train nothing."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in the output folder, and start none if there is nothing to go on with."""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start anew in an empty folder, and never go on with a run. Without either flag a run goes on
    if there is one."""


def train(words: list[str]) -> None:
    """Reads the recipe with its flags, and plays."""
    if {"-h", "--help"} & set(words):
        tyro.cli(Train, prog="gad-fast train", args=["--help"])
    if not words or words[0].startswith("-"):
        raise ConfigError("train needs a recipe: gad-fast train RECIPE.toml [--a.b value ...]")
    path, *flags = words
    switches = {"--dry-run", "--resume", "--fresh"} & set(flags)
    if {"--resume", "--fresh"} <= switches:
        raise ConfigError("--resume goes on with a run, --fresh never does: give one of them")
    recipe = Recipe.from_toml(path, overrides=overrides([f for f in flags if f not in switches]))
    # Imported here: torch takes seconds, and neither help nor a mistaken recipe needs it.
    from gad_fast import training

    if "--dry-run" in switches:
        training.dry_run(recipe)
    else:
        training.train(recipe, resume=_resume(switches))


def _resume(switches: set[str]) -> bool | None:
    if "--resume" in switches:
        return True
    return False if "--fresh" in switches else None
