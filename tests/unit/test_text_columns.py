"""A column of Arrow, of whatever library and form, has the ids of its strings."""

from typing import Any

import numpy as np
import pyarrow
import pytest

import tiny
from gad_fast import TextCodec, _core
from gad_fast.errors import DataError

TEXTS = ["red sun", "", "blue sea sky", "one <end> two", "été 東京"]


class Foreign:
    """A column of a library other than pyarrow."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._column.__arrow_c_stream__(requested_schema)


def codec() -> TextCodec:
    return TextCodec(tiny.tokenizer(), source="tiny")


COLUMNS = {
    "array": pyarrow.array(TEXTS),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "slice": pyarrow.array(["sky", *TEXTS, "sky"]).slice(1, len(TEXTS)),
    "chunks": pyarrow.chunked_array([TEXTS[:2], [], TEXTS[2:]]),
    "slice of chunks": pyarrow.chunked_array([["sky"], TEXTS, ["sky"]]).slice(1, len(TEXTS)),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "foreign": Foreign(pyarrow.chunked_array([TEXTS])),
    "null bitmap without nulls": pyarrow.array([*TEXTS, None]).slice(0, len(TEXTS)),
}


@pytest.mark.parametrize("form", COLUMNS)
def test_a_column_has_the_ids_of_its_strings(form: str) -> None:
    batch = codec().encode_batch(COLUMNS[form])
    expected = codec().encode_batch(TEXTS)
    np.testing.assert_array_equal(batch.ids, expected.ids)
    np.testing.assert_array_equal(batch.offsets, expected.offsets)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([], pyarrow.string()),
        pyarrow.chunked_array([], pyarrow.string()),
        pyarrow.array(TEXTS).slice(2, 0),
    ],
)
def test_a_column_without_rows_is_an_empty_batch(column: Any) -> None:
    batch = codec().encode_batch(column)
    assert (batch.ids.tolist(), batch.offsets.tolist()) == ([], [0])


def test_a_column_of_empty_strings_has_no_ids() -> None:
    batch = codec().encode_batch(pyarrow.array(["", ""]))
    assert (batch.ids.tolist(), batch.offsets.tolist()) == ([], [0, 0, 0])


def test_a_null_is_refused() -> None:
    with pytest.raises(DataError, match="a null is no text, and the column has 2 in 4 rows"):
        codec().encode_batch(pyarrow.array(["red", None, "sun", None]))


@pytest.mark.parametrize("values", [[1, 2], [b"red"], [["red"]], [None, None]])
def test_a_column_of_something_else_is_refused(values: list[Any]) -> None:
    with pytest.raises(DataError, match="texts must be strings, got a column of type"):
        codec().encode_batch(pyarrow.array(values))


def test_bytes_that_are_no_text_are_an_error() -> None:
    tokenizer = _core.Tokenizer.from_json(tiny.tokenizer().backend_tokenizer.to_str())
    data = np.frombuffer("red été".encode(), dtype=np.uint8)
    with pytest.raises(_core.TokenizerError, match="text 0 is no UTF-8 from its byte 4 on"):
        tokenizer.encode_utf8(data, np.array([0, 5, 9]))
    for offsets in ([], [0, 8], [0, 7, 5, 9], [-1, 9], [0, 2**62]):
        with pytest.raises(ValueError, match="offsets"):
            tokenizer.encode_utf8(data, np.array(offsets, dtype=np.int64))
    with pytest.raises(TypeError):
        tokenizer.encode_utf8(data.astype(np.int8), np.array([0, 9]))  # pyright: ignore
