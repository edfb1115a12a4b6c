"""`gad-fast train`."""

from __future__ import annotations

import logging
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


def train(words: list[str]) -> None:
    """Reads the recipe with its flags, and plays."""
    if {"-h", "--help"} & set(words):
        tyro.cli(Train, prog="gad-fast train", args=["--help"])
    if not words or words[0].startswith("-"):
        raise ConfigError("train needs a recipe: gad-fast train RECIPE.toml [--a.b value ...]")
    path, *flags = words
    recipe = Recipe.from_toml(path, overrides=overrides([f for f in flags if f != "--dry-run"]))
    # peft imports bitsandbytes where that is installed, which warns of kernels not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Imported here: torch takes seconds, and neither help nor a mistaken recipe needs it.
    from gad_fast import training

    if "--dry-run" in flags:
        training.dry_run(recipe)
    else:
        training.train(recipe)
