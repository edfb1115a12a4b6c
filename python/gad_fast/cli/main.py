"""The entry point: hands a command its words, and turns errors into one line and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from gad_fast.cli.bench import bench
from gad_fast.cli.cache import cache
from gad_fast.cli.collect import collect
from gad_fast.cli.generate import generate
from gad_fast.cli.train import train
from gad_fast.errors import ConfigError, GadFastError

HELP = """\
usage: gad-fast COMMAND ...

Distils a language model from a teacher that can only be asked for text.

commands:
  train RECIPE.toml [--a.b value ...] [--dry-run]   play the game that a recipe describes, or go on
                    [--resume | --fresh]            with an unfinished run in its output folder
  collect RECIPE.toml [--a.b value ...]             ask a teacher's API for responses
                      [--estimate] [--dry-run]
  generate MODEL --prompts FILE --output FILE       answer prompts with a model
  cache info CACHE                                  what a cache of teacher responses holds
  cache verify CACHE                                check every row of it
  cache export CACHE OUTPUT [--shape messages]      write it to a .jsonl or .parquet file
  cache import CACHE SOURCE [--teacher NAME]        bring such a file, or other rows, into it
  bench BENCHMARK [--quick] [--output FILE.json]    time a part against its peers

`gad-fast train --help` lists what a recipe may say, `gad-fast generate --help` its options.
"""

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "collect": collect,
    "generate": generate,
    "cache": cache,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Where it is installed, peft imports it, and every user without a GPU is told that products of
    # 4-bit weights are slow. No weights here have 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    try:
        _dispatch(words)
    except GadFastError as error:
        print(f"gad-fast: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"gad-fast: {error or 'interrupted'}", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(0)


def _dispatch(words: list[str]) -> None:
    match words:
        case [] | ["-h" | "--help"]:
            print(HELP, end="")  # noqa: T201
        case [command, *rest] if command in COMMANDS:
            COMMANDS[command](rest)
        case _:
            raise ConfigError(
                f"unknown command {words[0]!r}, allowed: {', '.join(COMMANDS)} "
                f"(see gad-fast --help)"
            )
