"""The prompts of a run: split, encoded in the student's tokens, served in shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gad_fast.config import DataSettings
from gad_fast.data.bought import Bought, join_cache, read_cache
from gad_fast.data.reading import read_examples, read_prompts
from gad_fast.data.split import count_near_duplicates, split_by_prompt, without_duplicates
from gad_fast.errors import ConfigError, DataError
from gad_fast.records import EncodedExample, Example
from gad_fast.text import TextCodec


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run, encoded and split."""

    train: list[EncodedExample]
    validation: list[EncodedExample]
    num_overlong: int
    """Prompts left out, of both parts, since they are over `max_prompt_tokens`."""
    num_duplicates: int = 0
    """Rows left out that repeat prompt and response of another."""
    num_flagged: int = 0
    """Responses of a cache left out for a flag of `leave_out`."""
    num_unanswered: int = 0
    """Prompts left out that the cache has no response to."""
    num_near_duplicates: int = 0
    """Training prompts, kept, that are nearly one of the validation part."""
    is_answered: bool = True
    """Whether the responses are there; else they are empty, and a teacher is yet to be asked."""

    @property
    def answered(self) -> list[EncodedExample]:
        """The part that has responses before the training begins."""
        return self.train if self.is_answered else self.validation

    def describe_left_out(self) -> str:
        """What of the rows is not used, and what else a user should know of them."""
        counts = {
            "over-long prompts": self.num_overlong,
            "repeated rows": self.num_duplicates,
            "flagged responses": self.num_flagged,
            "prompts without a response": self.num_unanswered,
        }
        left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        near = f"{self.num_near_duplicates} training prompts are nearly validation prompts"
        return (left_out or "nothing") + (f"; {near}" if self.num_near_duplicates else "")


def load_prompt_set(settings: DataSettings, codec: TextCodec) -> PromptSet:
    """Reads, splits and encodes the data of a run.

    Raises:
        DataError: a file is missing or unreadable, a row has no prompt or no teacher response, or
            nothing is left to train or to validate on.
        CacheError: the cache cannot be read.
    """
    source = _read(settings.train, settings)
    examples = source.examples
    rows = examples if settings.keep_duplicates else without_duplicates(examples)
    if settings.validation is not None:
        train, validation = rows, _read(settings.validation, settings).examples
    else:
        train, validation = split_by_prompt(rows, settings.validation_fraction)
    num_rows = len(train) + len(validation)
    encoded_train = encode_examples(train, settings, codec)
    encoded_validation = encode_examples(validation, settings, codec)
    require_examples(encoded_train, "train", len(train), settings)
    require_examples(encoded_validation, "validate", len(validation), settings)
    return PromptSet(
        train=encoded_train,
        validation=encoded_validation[: settings.max_validation_prompts],
        num_overlong=num_rows - len(encoded_train) - len(encoded_validation),
        num_duplicates=len(examples) - len(rows),
        num_flagged=source.num_flagged,
        num_unanswered=source.num_unanswered,
        num_near_duplicates=count_near_duplicates(
            train, validation, similarity=settings.near_duplicate_similarity
        ),
        is_answered=not settings.asks_while_training,
    )


def encode_examples(
    examples: Sequence[Example], settings: DataSettings, codec: TextCodec
) -> list[EncodedExample]:
    """Examples in the student's tokens, without those whose prompt is over the limit."""
    prompts = codec.encode_chats([e.messages for e in examples], add_generation_prompt=True)
    teachers = codec.encode_responses(
        [e.teacher_response for e in examples], max_tokens=settings.max_response_tokens
    )
    return [
        EncodedExample(example, prompt_ids, teacher)
        for example, prompt_ids, teacher in zip(examples, prompts, teachers, strict=True)
        if len(prompt_ids) <= settings.max_prompt_tokens
    ]


def require_examples(
    examples: list[EncodedExample], purpose: str, num_rows: int, settings: DataSettings
) -> None:
    """Raises DataError when nothing is left of `num_rows` rows for a purpose."""
    if examples:
        return
    if num_rows:
        raise DataError(
            f"nothing is left to {purpose} on: all {num_rows} prompts are over "
            f"data.max_prompt_tokens = {settings.max_prompt_tokens} (raise it)"
        )
    raise DataError(
        f"nothing to {purpose} on: {settings.train or settings.teacher} leaves no rows for it with "
        f"data.validation_fraction = {settings.validation_fraction} "
        f"(add rows, change the fraction, or name a file in data.validation)"
    )


class BatchStream:
    """Endless shuffled batches; each epoch is a new permutation, a last short batch is dropped."""

    def __init__(self, examples: list[EncodedExample], *, batch_size: int, seed: int) -> None:
        if batch_size > len(examples):
            raise ConfigError(
                f"batch.prompts_per_step is {batch_size}, but only {len(examples)} training "
                f"prompts are left after filtering (set it to {len(examples)} at most)"
            )
        self._examples, self.batch_size = examples, batch_size
        self._random = np.random.default_rng(seed)

    @property
    def num_examples(self) -> int:
        """Of an epoch, a last short batch included."""
        return len(self._examples)

    def __iter__(self) -> Iterator[list[EncodedExample]]:
        while True:
            order = self._random.permutation(len(self._examples))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield [self._examples[i] for i in order[start : start + self.batch_size]]


def _read(source: str | None, settings: DataSettings) -> Bought:
    """Examples of a source of rows, with the responses of the cache where the settings name one."""
    if settings.teacher is None:
        assert source is not None, "a recipe without a teacher names its rows"
        return Bought(read_examples(source, settings), num_flagged=0, num_unanswered=0)
    if settings.asks_while_training:
        assert source is not None, "a recipe that asks while training names its prompts"
        prompts = read_prompts(source, settings.prompt_column)
        return Bought([Example(prompt, "") for prompt in prompts], num_flagged=0, num_unanswered=0)
    path = Path(settings.teacher.removeprefix("cache:"))
    if source is None:
        return read_cache(path, settings.leave_out)
    return join_cache(path, read_prompts(source, settings.prompt_column), settings.leave_out)
