"""What `gad-fast generate` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from gad_fast.config.base import Document
from gad_fast.config.rollout import EngineName
from gad_fast.config.run import HardwareSettings


class GenerateSettings(Document):
    """Answers prompts with a model."""

    noun: ClassVar[str] = "settings"

    prompts: str
    """JSONL or Parquet file, or Hub id of a dataset, with a `prompt` or `messages` column."""
    output: Path
    """The .jsonl file to write, a line a prompt; it must not be there yet."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of an answer, the end token included."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the most likely token."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the so many most likely tokens; 0 draws from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest most likely tokens that have this probability together."""
    stop: tuple[str, ...] = ()
    """A string, or a TOML list of strings, that ends an answer and is no part of it."""
    n: int = Field(default=1, ge=1)
    """Answers a prompt."""
    seed: int = Field(default=0, ge=0)
    """Of the random numbers."""
    prompt_column: str | None = None
    """Column with the prompt; by default `messages` or `prompt`, whichever is there."""
    engine: EngineName = "static"
    """What samples; the answers are distributed alike."""
    max_sequences: int = Field(default=64, ge=1)
    """At most so many answers are sampled at once."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _has_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("stop strings must not be empty")
        return value

    @property
    def hardware(self) -> HardwareSettings:
        """Where the model runs, in the precision of its weights."""
        return HardwareSettings(device=self.device, compute_dtype="weights")
