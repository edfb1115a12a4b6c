"""The recipe of a collection: which prompts are asked, of whom, how fast, and for how much."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gad_fast.config.base import Document, Settings

_OWN_FIELDS = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "n", "stream", "stream_options"}
)


class TeacherSettings(Settings):
    """A model behind an OpenAI-compatible chat endpoint, and how it is asked."""

    model: str = Field(min_length=1)
    """The name by which the server knows it; it is a part of what the cache files responses by."""
    base_url: str = "https://api.openai.com/v1"
    """Where the server is."""
    api_key_env: str | None = None
    """Environment variable with the key. The key itself is never stored or shown."""
    api_key_file: Path | None = None
    """File with nothing but the key."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the responses that this teacher gives, next to the weights of the others. Which
    prompt goes to whom depends on the prompt's text, so a later start asks the same teacher."""
    system_prompt: str | None = None
    """Goes before every prompt that has no system turn of its own."""
    temperature: float | None = Field(default=None, ge=0)
    """Without it, the server decides."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Without it, the server decides."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a response."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit; newer OpenAI models want `max_completion_tokens`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request's body, as they are; a part of the cache key."""
    mode: Literal["chat", "batch"] = "chat"
    """`batch` sends files of requests to the provider's batch form: cheaper, within a day."""
    stream: bool = False
    """Responses come piece by piece, which keeps proxies from cutting long silences."""
    concurrency: int = Field(default=32, ge=1)
    """Open requests at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """At most so many requests, spread over the minute."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """At most so many tokens of prompts and responses; estimated first, then settled."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """A response that is not whole by then is given up and asked again."""
    prompt_price: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens, in the currency of the bill."""
    response_price: float | None = Field(default=None, ge=0)
    """Price of a million response tokens."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        # Names no value: a key that was pasted here must not come back in an error message.
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("must be the name of an environment variable, not the key itself")
        return name

    @field_validator("base_url")
    @classmethod
    def _is_a_clean_url(cls, url: str) -> str:
        parts = urlsplit(url)
        # Names no value: a password in the URL must not come back in an error message.
        if parts.username or parts.password or parts.query:
            raise ValueError("must hold no password and no query (keys go into api_key_env)")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must start with http:// or https:// and name a host")
        return url

    @model_validator(mode="after")
    def _is_of_one_mind(self) -> Self:
        if self.api_key_env and self.api_key_file:
            raise ValueError("takes one of api_key_env and api_key_file")
        if clash := sorted(_OWN_FIELDS & self.extra.keys()):
            raise ValueError(f"extra must leave {', '.join(clash)} to the settings of that name")
        if (self.prompt_price is None) != (self.response_price is None):
            raise ValueError("needs both of prompt_price and response_price, or neither")
        if self.mode == "batch" and self.stream:
            raise ValueError("a batch has no stream (leave one of mode and stream out)")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of the request's body that decide the response, beside model and messages."""
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            self.max_tokens_field: self.max_tokens,
        }
        return {**self.extra, **{key: value for key, value in named.items() if value is not None}}

    def cost_of(self, num_prompt_tokens: int, num_response_tokens: int) -> float | None:
        """Price of one response, in the currency of the bill, where prices are known."""
        if self.prompt_price is None or self.response_price is None:
            return None
        tokens = self.prompt_price * num_prompt_tokens + self.response_price * num_response_tokens
        return tokens / 1e6


class BudgetSettings(Settings):
    """What a collection may use in all, earlier starts on the same cache included."""

    requests: int | None = Field(default=None, ge=1)
    """Requests sent, those included that had to be repeated."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompts and responses."""
    cost: float | None = Field(default=None, gt=0)
    """Money, in the currency of the prices."""


class RetrySettings(Settings):
    """What is done about a request that fails."""

    max_attempts: int = Field(default=8, ge=1)
    """Attempts at one request, before it is left for the next start."""
    first_wait_seconds: float = Field(default=1.0, gt=0)
    """Wait before the second attempt; it doubles from attempt to attempt, with jitter."""
    longest_wait_seconds: float = Field(default=60.0, gt=0)
    """The wait grows no further. Where the server says `Retry-After`, that is honoured instead."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """The collection stops once more than this share of its requests was refused for good or given
    up, `min_judged` of them at least."""
    min_judged: int = Field(default=20, ge=1)
    """So many requests must be settled before `max_failed_share` is judged."""


class BatchApiSettings(Settings):
    """How the provider's batch form is used (`mode = "batch"`)."""

    max_requests: int = Field(default=10_000, ge=1, le=50_000)
    """Requests a batch."""
    poll_seconds: float = Field(default=60.0, gt=0)
    """Time from one look at a batch to the next."""


class CollectRecipe(Document):
    """A complete, validated description of a collection."""

    noun: ClassVar[str] = "recipe"

    prompts: str
    """File, folder or Hub id with the prompts; what `data.train` of a training recipe takes."""
    cache: Path
    """The cache that the responses go to; it is made if it is not there."""
    teachers: dict[str, TeacherSettings] = Field(min_length=1)
    """By a name for screen and flags: `[teachers.large]`, `--teachers.large.model`."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Each is a request of its own."""
    prompt_column: str | None = None
    """Column with the prompt, where the shape of the rows is not detected."""
    long_response_tokens: int | None = Field(default=None, ge=1)
    """Responses over so many tokens, as the server counts them, get the flag `long`."""
    estimate_prompts: int = Field(default=20, ge=2)
    """Requests that `--estimate` sends; their responses are kept."""
    budget: BudgetSettings = BudgetSettings()
    retry: RetrySettings = RetrySettings()
    batch_api: BatchApiSettings = BatchApiSettings()

    @model_validator(mode="after")
    def _can_keep_to_its_budget(self) -> Self:
        for name, teacher in self.teachers.items():
            if self.budget.cost is not None and teacher.prompt_price is None:
                raise ValueError(
                    f"budget.cost needs prompt_price and response_price of teachers.{name}"
                )
            if (self.budget.cost or self.budget.tokens) and teacher.max_tokens is None:
                raise ValueError(
                    f"a budget of tokens or cost needs max_tokens of teachers.{name}: without it, "
                    f"one response could pass the budget"
                )
        return self
