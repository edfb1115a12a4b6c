"""Rows of the teacher cache in files that everything reads: JSONL and Parquet."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from gad_fast.errors import CacheError
from gad_fast.teacher.records import CachedResponse, TeacherRequest, TeacherResponse

Row = dict[str, Any]
T = TypeVar("T")

_PARQUET_GROUP_ROWS = 4096


def export_rows(rows: Iterable[CachedResponse], output: Path) -> int:
    """Writes rows to `output`, which appears when it is whole, and gives their number.

    Raises:
        CacheError: the name ends in neither `.jsonl` nor `.parquet`, or the file cannot be written.
    """
    return _write_whole(
        (to_row(cached.request, cached.response) for cached in rows), output, _write_parquet
    )


def export_messages(rows: Iterable[CachedResponse], output: Path) -> int:
    """Writes chats that end with the response, as TRL and LLaMA-Factory read them.

    Flagged responses are not among them. Gives the number of rows; raises as `export_rows`.
    """
    chats = (_to_messages(cached) for cached in rows if not cached.response.flags)
    return _write_whole(chats, output, _write_messages_parquet)


def _write_whole(
    rows: Iterator[Row], output: Path, write_parquet: Callable[[Iterator[Row], Path], int]
) -> int:
    """Writes a file that appears when it is whole."""
    write = _choose(output, {".jsonl": _write_jsonl, ".parquet": write_parquet})
    partial = output.with_name(output.name + ".partial")
    try:
        num_rows = write(rows, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        raise CacheError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


def to_row(request: TeacherRequest, response: TeacherResponse) -> Row:
    """What an export holds of a response."""
    return {
        "teacher": request.teacher,
        "messages": request.messages,
        "sampling": request.sampling,
        "sample_index": request.sample_index,
        "teacher_response": response.text,
        "finish_reason": response.finish_reason,
        "num_prompt_tokens": response.num_prompt_tokens,
        "num_response_tokens": response.num_response_tokens,
        "cost": response.cost,
        "created": response.created,
        "flags": list(response.flags),
    }


def import_rows(source: Path) -> Iterator[tuple[TeacherRequest, TeacherResponse]]:
    """The rows of an exported file, or of one with at least the columns that have no default.

    Raises:
        CacheError: the file cannot be read, or a row is malformed; names the row.
    """
    read = _choose(source, {".jsonl": _read_jsonl, ".parquet": _read_parquet})
    rows = enumerate(read(source), start=1)
    while True:
        # `read` opens the file when it is first asked.
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            raise CacheError(f"cannot read {source}: {error}") from error
        yield _from_row(row, f"row {number} of {source}")


def _choose(path: Path, by_suffix: dict[str, T]) -> T:
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    raise CacheError(f"cannot tell the format of {path}: its name must end in .jsonl or .parquet")


def _to_messages(cached: CachedResponse) -> Row:
    response = {"role": "assistant", "content": cached.response.text}
    return {"messages": [*cached.request.messages, response]}


def _from_row(row: Row, name: str) -> tuple[TeacherRequest, TeacherResponse]:
    for column, kind in (("teacher", str), ("messages", list), ("teacher_response", str)):
        if not isinstance(row.get(column), kind):
            way_out = " (name it: --teacher NAME)" if column == "teacher" else ""
            raise CacheError(
                f"{name} has no {column}: it must be a {kind.__name__}, "
                f"got {row.get(column)!r:.80}{way_out}"
            )
    request = TeacherRequest(
        row["teacher"],
        row["messages"],
        _checked(row, "sampling", dict, name) or {},
        _checked(row, "sample_index", int, name) or 0,
    )
    created = _checked(row, "created", (int, float), name)
    response = TeacherResponse(
        row["teacher_response"],
        finish_reason=_checked(row, "finish_reason", str, name),
        num_prompt_tokens=_checked(row, "num_prompt_tokens", int, name),
        num_response_tokens=_checked(row, "num_response_tokens", int, name),
        cost=_checked(row, "cost", (int, float), name),
        **({} if created is None else {"created": created}),
        flags=_flags(row, name),
    )
    return request, response


def _flags(row: Row, name: str) -> tuple[str, ...]:
    flags: list[Any] = _checked(row, "flags", list, name) or []
    if not all(isinstance(flag, str) for flag in flags):
        raise CacheError(f"{name} has flags {flags!r:.80}, allowed: a list of texts")
    return tuple(flags)


def _checked(row: Row, column: str, kind: type | tuple[type, ...], name: str) -> Any:
    value = row.get(column)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    allowed = " or ".join(one.__name__ for one in kinds)
    raise CacheError(f"{name} has {column} {value!r:.80}, allowed: {allowed}, or leave it out")


def _write_jsonl(rows: Iterator[Row], path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CacheError(f"line {number} of {path} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise CacheError(f"line {number} of {path} is no JSON object: {row!r:.80}")
            yield cast("Row", row)


def _schema() -> Any:
    """Chats as columns where they fit; what columns cannot hold goes as JSON."""
    import pyarrow

    return pyarrow.schema(
        {
            "teacher": pyarrow.string(),
            "messages": _chat_type(),
            "messages_json": pyarrow.string(),
            "sampling_json": pyarrow.string(),
            "sample_index": pyarrow.int64(),
            "teacher_response": pyarrow.string(),
            "finish_reason": pyarrow.string(),
            "num_prompt_tokens": pyarrow.int64(),
            "num_response_tokens": pyarrow.int64(),
            "cost": pyarrow.float64(),
            "created": pyarrow.float64(),
            "flags": pyarrow.list_(pyarrow.string()),
        }
    )


def _chat_type() -> Any:
    import pyarrow

    return pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))


def _write_parquet(rows: Iterator[Row], path: Path) -> int:
    return _write_columns((_to_columns(row) for row in rows), path, _schema())


def _write_messages_parquet(rows: Iterator[Row], path: Path) -> int:
    import pyarrow

    return _write_columns(rows, path, pyarrow.schema({"messages": _chat_type()}))


def _write_columns(rows: Iterator[Row], path: Path, schema: Any) -> int:
    import pyarrow
    import pyarrow.parquet

    num_rows = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _PARQUET_GROUP_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_GROUP_ROWS):
                for row in batch.to_pylist():
                    yield _from_columns(row)
    except pyarrow.ArrowException as error:
        raise CacheError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _to_columns(row: Row) -> Row:
    is_plain = all(
        set(turn) == {"role", "content"} and all(isinstance(text, str) for text in turn.values())
        for turn in row["messages"]
    )
    return {
        **row,
        "messages": row["messages"] if is_plain else None,
        "messages_json": None if is_plain else json.dumps(row["messages"], ensure_ascii=False),
        "sampling_json": json.dumps(row["sampling"], ensure_ascii=False),
    }


def _from_columns(row: Row) -> Row:
    for column in ("messages", "sampling"):
        text = row.pop(f"{column}_json", None)
        if isinstance(text, str):
            row[column] = json.loads(text)
    return row
