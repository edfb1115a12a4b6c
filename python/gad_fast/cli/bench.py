"""`gad-fast bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gad_fast.errors import ConfigError

if TYPE_CHECKING:
    from gad_fast.bench.report import Report


class Options(argparse.Namespace):
    """What may be said after `gad-fast bench`."""

    command: str
    quick: bool
    output: Path | None
    model: Path
    folder: Path | None
    turns: int
    server: str | None


# Imported inside: torch and transformers take seconds, and neither help nor a mistake needs them.
def _tokenizer(options: Options) -> Report:
    from gad_fast.bench import tokenizer

    return tokenizer.run(options.model, quick=options.quick)


def _cache(options: Options) -> Report:
    from gad_fast.bench import cache

    return cache.run(options.folder, quick=options.quick)


def _buffer(options: Options) -> Report:
    from gad_fast.bench import buffer

    return buffer.run(quick=options.quick)


def _packing(options: Options) -> Report:
    from gad_fast.bench import packing

    return packing.run(quick=options.quick)


def _kernels(options: Options) -> Report:
    from gad_fast.bench import kernels

    return kernels.run(quick=options.quick)


def _rollouts(options: Options) -> Report:
    from gad_fast.bench import rollouts

    return rollouts.run(
        options.model, quick=options.quick, num_turns=options.turns, server=options.server
    )


def _step(options: Options) -> Report:
    from gad_fast.bench import step

    return step.run(options.model, quick=options.quick, num_turns=options.turns)


COMMANDS: dict[str, tuple[Callable[[Options], Report], str]] = {
    "tokenizer": (_tokenizer, "text to ids, against transformers and tokenizers"),
    "cache": (_cache, "durable responses a second and their size, against JSONL and sqlite3"),
    "buffer": (_buffer, "rollouts to tensors, against Python lists"),
    "packing": (_packing, "a million lengths into bins, against plain Python and TRL"),
    "kernels": (_kernels, "losses on the CPU, against naive autograd"),
    "step": (_step, "training on a step's rollouts, against the passes of the paper's code"),
    "rollouts": (_rollouts, "sampling on the CPU, against generate and continuous batching"),
}


def bench(words: list[str]) -> None:
    """Runs a benchmark, prints its table, and writes its file where one is asked for."""
    options = _parser().parse_args(words, namespace=Options())
    from rich.console import Console

    from gad_fast.bench import report

    if options.output is not None:
        report.check_output(options.output)
    run, _ = COMMANDS[options.command]
    found = run(options)
    report.show(found, Console(highlight=False))
    if options.output is not None:
        report.write(found, options.output)


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see gad-fast bench --help)")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of turns (1 or more)")
    return int(word)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gad-fast bench", description="Times ours and its peers in one run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--quick", action="store_true", help="a small run, seconds")
        command.add_argument("--output", type=Path, metavar="FILE.json", help="writes the result")
        if name in ("tokenizer", "step", "rollouts"):
            what = "with a tokenizer.json" if name == "tokenizer" else "a student"
            command.add_argument("--model", type=Path, required=True, metavar="FOLDER", help=what)
        if name in ("step", "rollouts"):
            what = "times that each side is measured; quick runs take one (default: 3)"
            command.add_argument("--turns", type=_count, default=3, metavar="N", help=what)
        if name == "rollouts":
            what = "a completions endpoint that serves the same model, as vLLM's: one more peer"
            command.add_argument("--server", metavar="URL", help=what)
        if name == "cache":
            command.add_argument(
                "--folder", type=Path, help="on the disk to measure; the temporary folder if absent"
            )
    return parser
