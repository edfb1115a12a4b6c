"""`gad-fast generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from gad_fast.cli.overrides import overrides
from gad_fast.config import GenerateSettings
from gad_fast.errors import ConfigError


@dataclass(frozen=True)
class Generate:
    """Answers prompts with a model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or Hub id of a decoder-only model with a chat template; it comes first."""
    settings: Annotated[GenerateSettings, tyro.conf.arg(name="")]


def generate(words: list[str]) -> None:
    """Reads the flags, samples, and says what was written."""
    if {"-h", "--help"} & set(words):
        tyro.cli(Generate, prog="gad-fast generate", args=["--help"])
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "generate needs a model: gad-fast generate MODEL --prompts FILE --output FILE.jsonl"
        )
    model, *flags = words
    settings = GenerateSettings.from_values(overrides(flags), source="generate")
    # Imported here: torch takes seconds, and neither help nor a mistake needs it.
    from gad_fast.rollout.answers import answer

    report = answer(model, settings, say=print)
    print(  # noqa: T201
        f"{report.num_answers} answers, {report.num_tokens} tokens, "
        f"{report.num_tokens / report.seconds:.0f} tokens/s: {settings.output}"
    )
