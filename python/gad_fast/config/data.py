"""The prompts, and which of them are used."""

from __future__ import annotations

from pydantic import Field

from gad_fast.config.base import Settings


class DataSettings(Settings):
    """Prompts with the teacher's responses, and which of them are used."""

    train: str
    """JSONL or Parquet file, or Hub id of a dataset, with prompts and teacher responses."""
    validation: str | None = None
    """File or Hub id held out from training; without one, a split of `train` is held out."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of `train` held out when `validation` is not given. The split depends on each
    prompt's own text, so rows that are added later do not move the others."""
    max_validation_prompts: int = Field(default=64, ge=1)
    """At most so many held-out prompts are used in each validation."""
    prompt_column: str | None = None
    """Column with the prompt: a string or a list of chat messages. By default `messages` or
    `prompt`, whichever is there."""
    response_column: str = "teacher_response"
    """Column with the teacher's response."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are left out and counted; a cut prompt would lose the assistant header."""
    max_response_tokens: int = Field(default=1536, ge=2)
    """Rollouts and teacher responses are both cut here, the end token included."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt with one response."""
        return self.max_prompt_tokens + self.max_response_tokens
