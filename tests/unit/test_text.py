"""The codec: templates as transformers renders them, and the token that ends an answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from gad_fast import TextCodec
from gad_fast.errors import DataError, ModelError
from gad_fast.records import Message, Response

CHAT: list[Any] = [
    Message(role="user", content="red sun"),
    Message(role="assistant", content="blue"),
    Message(role="user", content="sea"),
]


def codec(**overrides: Any) -> TextCodec:
    tokenizer = tiny.tokenizer()
    for name, value in overrides.items():
        setattr(tokenizer, name, value)
    return TextCodec(tokenizer, source="tiny")


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_encoded_as_transformers_does(add_generation_prompt: bool) -> None:
    batch = codec().encode_chats([CHAT, CHAT[:1]], add_generation_prompt=add_generation_prompt)
    for ids, chat in zip(batch, (CHAT, CHAT[:1]), strict=True):
        expected = tiny.tokenizer().apply_chat_template(
            chat, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        assert ids.tolist() == expected


def test_the_end_token_is_the_templates_where_it_differs_from_eos() -> None:
    """A Llama-3-like tokenizer: EOS ends a document, another token ends a turn."""
    assert codec().end_id == tiny.SPECIALS.index("<end>")
    assert codec(eos_token="<bos>").end_id == tiny.SPECIALS.index("<end>")
    bare = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert codec(chat_template=bare).end_id == tiny.tokenizer().eos_token_id
    picky = "{{ raise_exception('no chats today') }}"
    assert codec(chat_template=picky).end_id == tiny.tokenizer().eos_token_id


def test_the_pad_token_is_never_the_end_token() -> None:
    assert codec().pad_id == tiny.SPECIALS.index("<pad>")
    assert codec(pad_token="<end>").pad_id not in (None, codec().end_id)


def test_a_response_is_decoded_without_its_end_token() -> None:
    responses = codec().encode_responses(["one two", "red blue green one two three"], max_tokens=4)
    assert [response.is_finished for response in responses] == [True, False]
    assert codec().decode_responses(responses) == ["one two", "red blue green one"]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 9])
def test_a_teachers_response_is_cut_as_a_rollout_is(max_tokens: int) -> None:
    texts = ["", "one", "one two three", "one <end> two <end>", "<end>", "red blue green one two"]
    end = np.array([codec().end_id], dtype=np.int32)
    for text, response in zip(
        texts, codec().encode_responses(texts, max_tokens=max_tokens), strict=True
    ):
        (ids,) = codec().encode_batch([text])
        expected = Response.cut(np.append(ids, end), end_id=codec().end_id, max_tokens=max_tokens)
        np.testing.assert_array_equal(response.ids, expected.ids)
        assert response.ids.dtype == np.int32
        assert response.is_finished is expected.is_finished


def test_a_response_without_a_token_is_the_users_to_mend() -> None:
    with pytest.raises(DataError, match="cannot tokenize"):
        codec().encode_responses(["one \ud800"], max_tokens=3)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("chat_template", "the tokenizer of tiny has no chat template"),
        ("eos_token", "the tokenizer of tiny has no EOS token"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(missing: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        codec(**{missing: None})


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a tokenizer from") as caught:
        TextCodec.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_chat_is_told_with_the_chat() -> None:
    picky = (
        tiny.TEMPLATE + "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"refuses the messages \[\{'role': 'user'.* one turn"):
        codec(chat_template=picky).encode_chats([CHAT], add_generation_prompt=True)


def test_text_that_has_no_tokens_is_a_data_error() -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        codec().encode_batch(["red", "\ud83d"])
