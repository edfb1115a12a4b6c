"""Prompts with teacher responses: read, checked, split, encoded and served in shuffled batches."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from gad_fast.config import DataSettings
from gad_fast.errors import ConfigError, DataError
from gad_fast.records import EncodedExample, Example, Message
from gad_fast.text import TextCodec

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
MAX_ROW_BYTES = 16 << 20
"""A longer line or text is no row of prompts: another kind of file, or one made to fill memory."""
_PROMPT_COLUMNS = ("messages", "prompt")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run, encoded and split."""

    train: list[EncodedExample]
    validation: list[EncodedExample]
    num_overlong: int
    """Prompts left out, of both parts, since they are over `max_prompt_tokens`."""


def load_prompt_set(settings: DataSettings, codec: TextCodec) -> PromptSet:
    """Reads, splits and encodes the data of a run.

    Raises:
        DataError: a file is missing or unreadable, a row has no prompt or no teacher response, or
            nothing is left to train or to validate on.
    """
    train, validation = read_examples(settings.train, settings), None
    if settings.validation is not None:
        validation = read_examples(settings.validation, settings)
    else:
        train, validation = split_by_prompt(train, settings.validation_fraction)
    num_rows = len(train) + len(validation)
    encoded_train = encode_examples(train, settings, codec)
    encoded_validation = encode_examples(validation, settings, codec)
    _require(encoded_train, "train", len(train), settings)
    _require(encoded_validation, "validate", len(validation), settings)
    return PromptSet(
        train=encoded_train,
        validation=encoded_validation[: settings.max_validation_prompts],
        num_overlong=num_rows - len(encoded_train) - len(encoded_validation),
    )


def read_examples(source: str, settings: DataSettings) -> list[Example]:
    """The rows of a JSONL or Parquet file, or of a Hub dataset.

    Raises:
        DataError: the source cannot be read, or a row has no prompt or no teacher response.
    """
    rows = _load(source)
    prompt_column = _prompt_column(source, rows.column_names, settings.prompt_column)
    if settings.response_column not in rows.column_names:
        raise DataError(
            f"{source} has no column {settings.response_column!r}, only "
            f"{', '.join(rows.column_names)} (name the right one in data.response_column)"
        )
    columns = rows.select_columns([prompt_column, settings.response_column])
    return [
        Example(
            messages=_messages(row[prompt_column], f"row {number} of {source}", prompt_column),
            teacher_response=_response(row, f"row {number} of {source}", settings),
        )
        for number, row in enumerate(cast("list[dict[str, Any]]", columns.to_list()), start=1)
    ]


def read_prompts(source: str, prompt_column: str | None) -> list[list[Message]]:
    """The prompts alone of a JSONL or Parquet file, or of a Hub dataset.

    Raises:
        DataError: the source cannot be read, or a row has no prompt.
    """
    rows = _load(source)
    column = _prompt_column(source, rows.column_names, prompt_column)
    values = cast("list[Any]", rows[column][:])
    return [
        _messages(value, f"row {number} of {source}", column)
        for number, value in enumerate(values, start=1)
    ]


def split_by_prompt(
    examples: Sequence[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
    """Train and validation part; equal prompts are on the same side, whatever else is there."""
    keys = [_prompt_key(example) for example in examples]
    train = [e for e, key in zip(examples, keys, strict=True) if key >= fraction]
    held_out = [(key, e) for e, key in zip(examples, keys, strict=True) if key < fraction]
    held_out.sort(key=lambda pair: pair[0])
    return train, [example for _, example in held_out]


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


class BatchStream:
    """Endless shuffled batches; each epoch is a new permutation, a last short batch is dropped."""

    def __init__(self, examples: list[EncodedExample], *, batch_size: int, seed: int) -> None:
        if batch_size > len(examples):
            raise ConfigError(
                f"batch.prompts_per_step is {batch_size}, but only {len(examples)} training "
                f"prompts are left after filtering (set it to {len(examples)} at most)"
            )
        self._examples, self._batch_size = examples, batch_size
        self._random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[list[EncodedExample]]:
        while True:
            order = self._random.permutation(len(self._examples))
            for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
                yield [self._examples[i] for i in order[start : start + self._batch_size]]


def _load(source: str) -> datasets.Dataset:
    path = Path(source)
    loader = _LOADERS.get(path.suffix)
    if loader is not None and not path.is_file():
        raise DataError(f"data file {source} is not there (paths are relative to {Path.cwd()})")
    if loader is None and path.is_file():
        raise DataError(f"cannot read {source}: its name must end in {', '.join(_LOADERS)}")
    if path.suffix == ".jsonl":
        _require_short_lines(path)
    try:
        if loader is None:
            return datasets.load_dataset(source, split="train")
        return datasets.load_dataset(loader, data_files=source, split="train")
    except StopIteration as error:  # what datasets makes of a file without rows
        raise DataError(f"cannot read {source}: it has no rows") from error
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_root_cause(error)}") from error


def _require_short_lines(path: Path) -> None:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            _require_row_size(len(line), f"line {number} of {path}")


def _require_row_size(size: int, name: str) -> None:
    if size > MAX_ROW_BYTES:
        raise DataError(
            f"{name} is over {MAX_ROW_BYTES >> 20} MiB, the most that a row may have (remove it, "
            f"or check that this is a file of prompts)"
        )


def _prompt_column(source: str, columns: list[str], name: str | None) -> str:
    wanted = (name,) if name else _PROMPT_COLUMNS
    for column in wanted:
        if column in columns:
            return column
    raise DataError(
        f"{source} has no column {' or '.join(map(repr, wanted))}, only {', '.join(columns)} "
        f"(name the right one as prompt_column)"
    )


def _messages(value: Any, row: str, column: str) -> list[Message]:
    if isinstance(value, str) and value.strip():
        _require_row_size(len(value), row)
        return [Message(role="user", content=value)]
    if isinstance(value, list) and value:
        turns = cast("list[Any]", value)
        if all(_is_turn(turn) for turn in turns):
            _require_row_size(sum(len(turn["content"]) for turn in turns), row)
            return [Message(role=turn["role"], content=turn["content"]) for turn in turns]
    raise DataError(
        f"{row} has no prompt: {column} must be a text or a list of "
        f'{{"role": ..., "content": ...}} turns, got {value!r:.80}'
    )


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(cast("dict[str, Any]", turn).get(key), str) for key in ("role", "content")
    )


def _response(row: dict[str, Any], name: str, settings: DataSettings) -> str:
    value = row[settings.response_column]
    if isinstance(value, str) and value.strip():
        _require_row_size(len(value), name)
        return value
    raise DataError(
        f"{name} has no teacher response: {settings.response_column} must be a text that is not "
        f"empty, got {value!r:.80} (remove the row or ask the teacher again)"
    )


def _prompt_key(example: Example) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    text = json.dumps(example.messages, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _require(
    examples: list[EncodedExample], purpose: str, num_rows: int, settings: DataSettings
) -> None:
    if examples:
        return
    if num_rows:
        raise DataError(
            f"nothing is left to {purpose} on: all {num_rows} prompts are over "
            f"data.max_prompt_tokens = {settings.max_prompt_tokens} (raise it)"
        )
    raise DataError(
        f"nothing to {purpose} on: {settings.train} leaves no rows for it with "
        f"data.validation_fraction = {settings.validation_fraction} "
        f"(add rows, change the fraction, or name a file in data.validation)"
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
