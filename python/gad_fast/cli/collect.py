"""`gad-fast collect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gad_fast.cli.overrides import overrides
from gad_fast.config import CollectRecipe, TeacherSettings
from gad_fast.errors import ConfigError

if TYPE_CHECKING:
    from gad_fast.teacher.estimate import TeacherEstimate


@dataclass(frozen=True)
class Collect:
    """Asks teachers and keeps what they answer; any key of the recipe can be given another value.

    Start it again to go on: what is in the cache is never asked for again. The keys of a teacher
    are under its name: --teachers.NAME.model, and so on.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE.toml")]
    """The recipe file; it comes first."""
    recipe: Annotated[CollectRecipe, tyro.conf.arg(name="")]
    estimate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask a sample, keep it, and tell what the rest will cost."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Tell what would be asked; ask nothing."""


# Shows the keys of a teacher in the help, which lists those of a value only.
_EXAMPLE = Collect(
    path=Path("RECIPE.toml"),
    recipe=CollectRecipe(
        prompts="PROMPTS.jsonl",
        cache=Path("TEACHER.cache"),
        teachers={"NAME": TeacherSettings(model="MODEL")},
    ),
)


def collect(words: list[str]) -> None:
    """Reads the recipe with its flags, and asks."""
    if {"-h", "--help"} & set(words):
        tyro.cli(Collect, prog="gad-fast collect", args=["--help"], default=_EXAMPLE)
    if not words or words[0].startswith("-"):
        raise ConfigError("collect needs a recipe: gad-fast collect RECIPE.toml [--a.b value ...]")
    path, *flags = words
    own = {"--estimate", "--dry-run"}
    recipe = CollectRecipe.from_toml(path, overrides=overrides([f for f in flags if f not in own]))
    if "--dry-run" in flags:
        _dry_run(recipe)
    elif "--estimate" in flags:
        _estimate(recipe)
    else:
        # Imported here, as below: reading data takes a second, which help need not wait for.
        from gad_fast.data.reading import read_prompts
        from gad_fast.teacher.collect import collect as collect_responses

        prompts = read_prompts(recipe.prompts, recipe.prompt_column)
        print(collect_responses(recipe, prompts))  # noqa: T201


def _dry_run(recipe: CollectRecipe) -> None:
    from gad_fast.data.reading import read_prompts
    from gad_fast.teacher.stock import inspect

    prompts = read_prompts(recipe.prompts, recipe.prompt_column)
    stock = inspect(recipe, prompts)
    print(  # noqa: T201
        f"{len(prompts)} prompts; {stock.num_wanted} responses wanted, {stock.num_kept} in "
        f"{recipe.cache}, {stock.num_rejected} rejected"
    )
    for name, requests in stock.pending.items():
        teacher = recipe.teachers[name]
        print(f"{name}: {len(requests)} to ask of {teacher.model} at {teacher.base_url}")  # noqa: T201


def _estimate(recipe: CollectRecipe) -> None:
    from gad_fast.data.reading import read_prompts
    from gad_fast.teacher.estimate import estimate

    result = estimate(recipe, read_prompts(recipe.prompts, recipe.prompt_column))
    print(result.sample)  # noqa: T201
    for teacher in result.teachers:
        print(_describe(teacher))  # noqa: T201


def _describe(estimate: TeacherEstimate) -> str:
    from gad_fast.teacher.progress import clock

    parts = [f"{estimate.teacher}: {estimate.num_requests} requests"]
    if estimate.tokens is not None:
        parts.append(f"about {estimate.tokens:.0f} tokens (+- {estimate.tokens_error:.0f})")
    if estimate.cost is not None:
        parts.append(f"cost {estimate.cost:.4g}")
    if estimate.seconds is not None:
        parts.append(f"time {clock(estimate.seconds)}")
    return ", ".join(parts) + f", from a sample of {estimate.num_sampled}"
