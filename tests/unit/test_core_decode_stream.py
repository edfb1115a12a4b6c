"""A stream of ids gives the text of all of them, piece by piece, up to a stop string."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import tiny
from gad_fast import TextCodec, _core

END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> _core.Tokenizer:
    """One token for each byte, so that every character beyond ASCII is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reference = tokenizers.Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([END])
    return _core.Tokenizer.from_json(reference.to_str())


def pieces(tokenizer: _core.Tokenizer, text: str, *stop: str) -> list[str]:
    ids, _ = tokenizer.encode_batch([text])
    stream = tokenizer.decode_stream(stop, skip_special_tokens=True)
    return [*(stream.push(int(id_)) for id_ in ids), stream.finish()]


def test_a_family_comes_with_the_last_byte_of_each_of_its_members(
    tokenizer: _core.Tokenizer,
) -> None:
    given_out = [piece for piece in pieces(tokenizer, "👩‍👦!") if piece]
    assert given_out == ["👩", "\u200d", "👦", "!"]


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer: _core.Tokenizer) -> None:
    assert pieces(tokenizer, "a\n\nb", "\n\nUser:") == ["a", "", "", "\n\nb", ""]


def test_a_stop_string_ends_the_text(tokenizer: _core.Tokenizer) -> None:
    stream = tokenizer.decode_stream(["é!"], skip_special_tokens=True)
    ids, _ = tokenizer.encode_batch(["café!no"])
    text = ""
    for id_ in ids:
        assert not stream.is_stopped
        text += stream.push(int(id_))
        if stream.is_stopped:
            break
    assert (text, stream.push(int(ids[0])), stream.finish()) == ("caf", "", "")


@given(st.text(max_size=30), st.lists(st.sampled_from(["\n\n", "é", "ab", "b", "👩"]), max_size=2))
@settings(deadline=None)
def test_the_pieces_make_up_the_text_before_the_first_stop(
    tokenizer: _core.Tokenizer, text: str, stop: list[str]
) -> None:
    text = text + "a👩‍👦\n\n" + text
    starts = [text.index(string) for string in stop if string in text]
    # None of these overlap otherwise than "ab" and "b", which end together.
    assert "".join(pieces(tokenizer, text, *stop)) == text[: min(starts, default=None)]


def test_special_tokens_are_skipped_on_demand(tokenizer: _core.Tokenizer) -> None:
    ids, _ = tokenizer.encode_batch([f"a{END}b"])
    for skip, expected in ((True, ["a", "", "b"]), (False, ["a", END, "b"])):
        stream = tokenizer.decode_stream(skip_special_tokens=skip)
        assert [stream.push(int(id_)) for id_ in ids] == expected


def test_ids_that_are_none_are_told_apart(tokenizer: _core.Tokenizer) -> None:
    stream = tokenizer.decode_stream(skip_special_tokens=True)
    assert stream.push(100_000) == ""
    with pytest.raises(ValueError, match="at least 0, got -1 at position 1"):
        stream.push(-1)
    with pytest.raises(OverflowError):
        stream.push(2**31)
    with pytest.raises(TypeError):
        stream.push("a")  # pyright: ignore


def test_stop_strings_that_are_none_are_refused(tokenizer: _core.Tokenizer) -> None:
    with pytest.raises(ValueError, match="stop strings must not be empty, got an empty one at 1"):
        tokenizer.decode_stream(["a", ""], skip_special_tokens=True)
    for stop in ("one string", [1], [b"a"], ["\ud83d"]):
        with pytest.raises((TypeError, ValueError)):
            tokenizer.decode_stream(stop, skip_special_tokens=True)  # pyright: ignore


def test_the_codec_streams_what_it_decodes() -> None:
    codec = TextCodec(tiny.tokenizer(), source="tiny")
    (ids,) = codec.encode_batch(["red green <end> blue one two three"])
    stream = codec.decode_stream(stop=["two"])
    text = "".join(stream.push(int(id_)) for id_ in ids)
    (expected,) = codec.decode_batch([ids])
    assert text == expected.partition("two")[0]
    assert stream.is_stopped


def test_a_stream_outlives_its_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tiny.tokenizer().backend_tokenizer.to_str())
    ids, offsets = _core.Tokenizer.from_file(path).encode_batch(["red green"])
    expected = _core.Tokenizer.from_file(path).decode_batch(
        ids, np.array(offsets), skip_special_tokens=True
    )
    stream = _core.Tokenizer.from_file(path).decode_stream(skip_special_tokens=True)
    assert ["".join(stream.push(int(id_)) for id_ in ids)] == expected
