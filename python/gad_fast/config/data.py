"""The prompts, and which of them are used."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gad_fast.config.base import Settings

ResponseFlag = Literal["empty", "refusal", "truncated", "long"]


class DataSettings(Settings):
    """Prompts with the teacher's responses, and which of them are used."""

    train: str | None = None
    """Prompts with teacher responses, or, with `teacher`, prompts: a JSONL or Parquet file, a
    folder of them, or the Hub id of a dataset. Only `teacher = "cache:..."` does without."""
    validation: str | None = None
    """The same, held out from training; without one, a split of `train` is held out."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of `train` held out when `validation` is not given. The split depends on each
    prompt's own text, so rows that are added later do not move the others."""
    max_validation_prompts: int = Field(default=64, ge=1)
    """At most so many held-out prompts are used in each validation."""
    prompt_column: str | None = None
    """Column with the prompt: a string or a list of chat messages. By default the shape of the
    rows is detected: `messages`, `prompt`, ShareGPT's `conversations`, Alpaca's `instruction`."""
    response_column: str | None = None
    """Column with the teacher's response. By default `teacher_response`, or what the shape has:
    the last assistant turn, or Alpaca's `output`."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are left out and counted; a cut prompt would lose the assistant header."""
    max_response_tokens: int = Field(default=1536, ge=2)
    """Rollouts and teacher responses are both cut here, the end token included."""
    teacher: str | None = Field(default=None, pattern="^(cache|collect):.+")
    """Where the responses are if not in the rows: `cache:PATH` of what `gad-fast collect` brought,
    or `collect:RECIPE.toml` to ask a teacher while training."""
    leave_out: tuple[ResponseFlag, ...] = ("empty", "refusal", "truncated", "long")
    """Responses of a cache with one of these flags are left out and counted."""
    near_duplicate_similarity: float = Field(default=0.8, gt=0, le=1)
    """Training prompts whose word triples have this Jaccard index with a validation prompt's are
    reported as near-duplicates; they are kept."""
    steps_ahead: int = Field(default=4, ge=1)
    """With `teacher = "collect:..."`, responses are asked for so many steps before their use."""
    keep_duplicates: bool = False
    """Keep rows that repeat both a prompt and its response; by default they are left out and
    counted. True where the rows are draws from a distribution, whose repeats are its weights."""

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if self.train is None and not (self.teacher or "").startswith("cache:"):
            raise ValueError("train is missing (only teacher = 'cache:PATH' does without)")
        return self

    @property
    def asks_while_training(self) -> bool:
        """Whether responses are yet to come when the training begins."""
        return (self.teacher or "").startswith("collect:")

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt with one response."""
        return self.max_prompt_tokens + self.max_response_tokens
