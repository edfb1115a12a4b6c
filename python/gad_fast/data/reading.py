"""Rows of files, folders and Hub datasets, as prompts and as examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from gad_fast.config import DataSettings
from gad_fast.data.shapes import Shape, detect
from gad_fast.errors import DataError
from gad_fast.records import Example, Message

MAX_ROW_BYTES = 16 << 20
"""A longer line or text is no row of prompts: another kind of file, or one made to fill memory."""
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_examples(source: str, settings: DataSettings) -> list[Example]:
    """The rows of a file, a folder of files, or a Hub dataset, with the teacher's responses.

    Raises:
        DataError: the source cannot be read, or a row has no prompt or no teacher response.
    """
    rows = _load(source)
    shape = detect(rows.column_names, source, settings.prompt_column, settings.response_column)
    if shape.response_column not in rows.column_names:
        raise DataError(
            f"{source} has no column {shape.response_column!r}, only "
            f"{', '.join(rows.column_names)} (name the right one in data.response_column)"
        )
    examples: list[Example] = []
    for number, row in _numbered(rows.select_columns(shape.columns)):
        name = f"row {number} of {source}"
        examples.append(Example(_prompt(row, shape, name), _response(row, shape, name)))
    return examples


def read_prompts(source: str, prompt_column: str | None) -> list[list[Message]]:
    """The prompts alone of what `read_examples` reads; a response in a row is not looked at.

    Raises:
        DataError: the source cannot be read, or a row has no prompt.
    """
    rows = _load(source)
    shape = detect(rows.column_names, source, prompt_column, None)
    columns = [column for column in shape.columns if column in rows.column_names]
    return [
        _prompt(row, shape, f"row {number} of {source}")
        for number, row in _numbered(rows.select_columns(columns))
    ]


def _numbered(rows: datasets.Dataset) -> Sequence[tuple[int, dict[str, Any]]]:
    return list(enumerate(cast("list[dict[str, Any]]", rows.to_list()), start=1))


def _load(source: str) -> datasets.Dataset:
    loader, files = _files(source)
    datasets.disable_progress_bars()
    try:
        if loader is None:
            return datasets.load_dataset(source, split="train")
        return datasets.load_dataset(loader, data_files=files, split="train")
    except StopIteration as error:  # what datasets makes of a file without rows
        raise DataError(f"cannot read {source}: it has no rows") from error
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"cannot read {source}: {_root_cause(error)}") from error


def _files(source: str) -> tuple[str | None, list[str]]:
    """Loader and files of a local source; no loader for what can only be a Hub id."""
    path = Path(source)
    if path.is_dir():
        return _files_of_folder(path)
    loader = _LOADERS.get(path.suffix)
    if loader is not None and not path.is_file():
        raise DataError(f"data file {source} is not there (paths are relative to {Path.cwd()})")
    if loader is None and path.is_file():
        raise DataError(f"cannot read {source}: its name must end in {', '.join(_LOADERS)}")
    _require_short_lines([source])
    return loader, [source]


def _files_of_folder(folder: Path) -> tuple[str, list[str]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in _LOADERS and path.is_file())
    loaders = {_LOADERS[path.suffix] for path in files}
    if len(loaders) != 1:
        held = "both JSON and Parquet files" if loaders else f"no {', '.join(_LOADERS)} files"
        raise DataError(f"cannot read folder {folder}: it holds {held} (it must hold one kind)")
    names = [str(path) for path in files]
    _require_short_lines(names)
    return loaders.pop(), names


def _require_short_lines(files: Sequence[str]) -> None:
    for name in files:
        if name.endswith(".jsonl"):
            with Path(name).open("rb") as file:
                for number in itertools.count(1):
                    line = file.readline(MAX_ROW_BYTES + 1)
                    if not line:
                        break
                    _require_row_size(len(line), f"line {number} of {name}")


def _require_row_size(size: int, name: str) -> None:
    if size > MAX_ROW_BYTES:
        raise DataError(
            f"{name} is over {MAX_ROW_BYTES >> 20} MiB, the most that a row may have (remove it, "
            f"or check that this is a file of prompts)"
        )


def _prompt(row: dict[str, Any], shape: Shape, name: str) -> list[Message]:
    prompt = shape.prompt_of(row)
    if prompt is not None:
        _require_row_size(sum(len(turn["content"]) for turn in prompt), name)
        return prompt
    raise DataError(
        f"{name} has no prompt: {shape.prompt_column} must be a text or a list of "
        f'{{"role": ..., "content": ...}} turns, got {row[shape.prompt_column]!r:.80}'
    )


def _response(row: dict[str, Any], shape: Shape, name: str) -> str:
    value = shape.response_of(row)
    if isinstance(value, str) and value.strip():
        _require_row_size(len(value), name)
        return value
    raise DataError(
        f"{name} has no teacher response: {shape.response_column} must be a text that is not "
        f"empty, got {value!r:.80} (remove the row or ask the teacher again)"
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
