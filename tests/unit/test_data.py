"""Rows in, prompts out: shapes, filters, the split, and rows that cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

import tiny
from gad_fast.config import DataSettings
from gad_fast.data.prompt_set import BatchStream, encode_examples, load_prompt_set
from gad_fast.data.reading import read_examples
from gad_fast.data.split import split_by_prompt
from gad_fast.errors import ConfigError, DataError
from gad_fast.records import Example, Message
from gad_fast.text import TextCodec


@pytest.fixture
def codec() -> TextCodec:
    return TextCodec(tiny.tokenizer(), source="tiny")


def settings(path: Path, **overrides: Any) -> DataSettings:
    limits = {"max_prompt_tokens": 16, "max_response_tokens": 6, "validation_fraction": 0.2}
    return DataSettings(train=str(path), **{**limits, **overrides})


def read(path: Path, **overrides: Any) -> list[Example]:
    return read_examples(str(path), settings(path, **overrides))


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_jsonl_and_parquet_give_the_same_examples(tmp_path: Path) -> None:
    rows = tiny.rows(5)
    jsonl = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    parquet = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(parquet)
    assert read(jsonl) == read(parquet)
    assert read(jsonl)[1].messages == user(rows[1]["prompt"])
    assert read(jsonl)[1].teacher_response == rows[1]["teacher_response"]


def test_chats_and_renamed_columns_are_read(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "sun"},
    ]
    path = tiny.write_rows(tmp_path / "a.jsonl", [{"messages": chat, "teacher_response": "sea"}])
    assert read(path)[0].messages == chat
    path = tiny.write_rows(tmp_path / "b.jsonl", [{"content": chat, "answer": "sea", "id": 3}])
    assert read(path, prompt_column="content", response_column="answer")[0].messages == chat


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "red", "teacher_response": None}, "row 2 of .* has no teacher response"),
        ({"prompt": "red", "teacher_response": "  "}, "row 2 of .* has no teacher response"),
        ({"prompt": "", "teacher_response": "sun"}, "row 2 of .* has no prompt"),
        ({"prompt": None, "teacher_response": "sun"}, "row 2 of .* has no prompt"),
    ],
)
def test_a_row_that_lacks_a_side_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.rows(1), row])
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "red", "teacher_response": "sun"}\n', "no column 'messages' or 'prompt'"),
        ('{"prompt": "red", "answer": "sun"}\n', "no column 'teacher_response', only prompt"),
        ('{"prompt": "red", "teacher_', "cannot read .*rows.jsonl"),
        ('{"messages": [{"role": "user"}], "teacher_response": "sun"}\n', "row 1 .* has no prompt"),
        ('{"messages": [], "teacher_response": "sun"}\n', "row 1 of .* has no prompt"),
        ("", "cannot read .*rows.jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl is not there \(paths are relative to"):
        read(tmp_path / "nowhere.jsonl")


def test_a_file_of_an_unknown_kind_is_told_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,teacher_response\n")
    with pytest.raises(DataError, match=r"rows.csv: its name must end in .jsonl, .json, .parquet"):
        read(path)


def test_prompts_over_the_limit_are_left_out_and_counted_never_cut(
    tmp_path: Path, codec: TextCodec
) -> None:
    rows = [
        {"prompt": " ".join(["red"] * length), "teacher_response": "sun"} for length in range(1, 20)
    ]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    prompts = load_prompt_set(settings(path), codec)
    # <bos> <user> ... <assistant>: 13 words are 16 tokens.
    assert prompts.num_overlong == 6
    kept = [*prompts.train, *prompts.validation]
    assert sorted(len(prompt.prompt_ids) for prompt in kept) == list(range(4, 17))
    header = tiny.SPECIALS.index("<assistant>")
    assert all(prompt.prompt_ids[-1] == header for prompt in kept)


def test_nothing_left_after_filtering_is_an_error(tmp_path: Path, codec: TextCodec) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(30))
    with pytest.raises(DataError, match=r"nothing is left to train on: all \d+ prompts are over"):
        load_prompt_set(settings(path, max_prompt_tokens=3), codec)
    one = tiny.write_rows(tmp_path / "one.jsonl", tiny.rows(1))
    with pytest.raises(DataError, match=r"nothing to .* on: .*one\.jsonl leaves no rows"):
        load_prompt_set(settings(one), codec)


def test_the_split_is_deterministic_and_does_not_move_when_rows_are_added() -> None:
    examples = [Example(user(f"prompt {i}"), f"answer {i}") for i in range(200)]
    train, held_out = split_by_prompt(examples, 0.25)
    assert 30 < len(held_out) < 70
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, examples))
    more = [Example(user(f"more {i}"), "x") for i in range(100)]
    train_after, held_out_after = split_by_prompt([*more, *reversed(examples)], 0.25)
    assert {str(e) for e in train} <= {str(e) for e in train_after}
    assert {str(e) for e in held_out} <= {str(e) for e in held_out_after}


def test_equal_prompts_are_never_on_both_sides() -> None:
    examples = [Example(user(f"prompt {i % 20}"), f"answer {i}") for i in range(100)]
    train, held_out = split_by_prompt(examples, 0.3)
    sides = [{str(example.messages) for example in part} for part in (train, held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_teacher_responses_end_with_the_end_token_unless_cut(
    tmp_path: Path, codec: TextCodec
) -> None:
    texts = ["one", "one two three red blue", "one two three red blue green", "one <end> two"]
    examples = [Example(user("sun"), text) for text in texts]
    encoded = encode_examples(examples, settings(tmp_path), codec)
    end = codec.end_id
    assert [(len(e.teacher), e.teacher.is_finished) for e in encoded] == [
        (2, True),
        (6, True),
        (6, False),
        (2, True),
    ]
    assert [end in e.teacher.ids for e in encoded] == [True, True, False, True]


def test_an_epoch_serves_every_prompt_once_in_an_order_of_its_own(
    tmp_path: Path, codec: TextCodec
) -> None:
    encoded = encode_examples(
        [Example(user(" ".join(["red"] * n)), "sun") for n in range(1, 8)],
        settings(tmp_path),
        codec,
    )
    batches = iter(BatchStream(encoded, batch_size=3, seed=1))
    epochs = [[len(e.prompt_ids) for _ in range(2) for e in next(batches)] for _ in range(3)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = iter(BatchStream(encoded, batch_size=3, seed=1))
    assert [len(e.prompt_ids) for e in next(again)] == epochs[0][:3]
    with pytest.raises(ConfigError, match="prompts_per_step is 8, but only 7 training prompts"):
        BatchStream(encoded, batch_size=8, seed=1)


def test_ids_are_packed_as_int32(codec: TextCodec) -> None:
    batch = codec.encode_batch(["red sun", "", "sea"])
    assert batch.ids.dtype == np.int32
    assert batch.offsets.tolist() == [0, 2, 2, 3]
    assert codec.decode_batch(batch) == ["red sun", "", "sea"]


def test_repeats_are_left_out_and_counted_unless_they_are_weights(tmp_path: Path) -> None:
    tiny.save_student(tmp_path / "student")
    codec = TextCodec.from_pretrained(tmp_path / "student")
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(12) * 3)
    for keep, (num_left, num_out) in {False: (12, 24), True: (36, 0)}.items():
        settings = DataSettings(
            train=str(path),
            validation_fraction=0.3,
            keep_duplicates=keep,
            max_validation_prompts=99,
        )
        prompts = load_prompt_set(settings, codec)
        assert len(prompts.train) + len(prompts.validation) == num_left
        assert prompts.num_duplicates == num_out
