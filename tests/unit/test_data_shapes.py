"""Rows of every usual shape give the same prompts and responses; what repeats is told."""

from pathlib import Path
from typing import Any

import pytest

import tiny
from gad_fast.config import DataSettings
from gad_fast.data.prompt_set import load_prompt_set
from gad_fast.data.reading import read_examples, read_prompts
from gad_fast.data.split import count_near_duplicates, without_duplicates
from gad_fast.errors import DataError
from gad_fast.records import Example, Message
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.text import TextCodec


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)


SHAPES: dict[str, tuple[dict[str, Any], list[Message]]] = {
    "prompt": ({"prompt": "red", "teacher_response": "sun"}, [user("red")]),
    "prompt of turns": (
        {"prompt": [system("be"), user("red")], "teacher_response": "sun"},
        [system("be"), user("red")],
    ),
    "messages and a column": (
        {"messages": [user("red")], "teacher_response": "sun", "id": 7},
        [user("red")],
    ),
    "messages that end with the response": (
        {"messages": [user("a"), assistant("b"), user("red"), assistant("sun")]},
        [user("a"), assistant("b"), user("red")],
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "be"},
                {"from": "human", "value": "red"},
                {"from": "gpt", "value": "sun"},
            ]
        },
        [system("be"), user("red")],
    ),
    "ShareGPT with roles": (
        {"conversations": [user("red"), assistant("sun")], "source": "x"},
        [user("red")],
    ),
    "Alpaca": ({"instruction": "red", "input": "", "output": "sun"}, [user("red")]),
    "Alpaca with input": (
        {"instruction": "say", "input": "red", "output": "sun", "system": "be"},
        [system("be"), user("say\nred")],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_detected(name: str, tmp_path: Path) -> None:
    row, prompt = SHAPES[name]
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, row])
    (example, _) = read_examples(str(path), DataSettings(train=str(path)))
    assert example == Example(prompt, "sun")
    assert read_prompts(str(path), None) == [prompt, prompt]


def test_prompts_alone_need_no_response(tmp_path: Path) -> None:
    for number, row in enumerate(
        [{"prompt": "red"}, {"messages": [user("red")]}, {"instruction": "red"}]
    ):
        path = tiny.write_rows(tmp_path / f"{number}.jsonl", [row])
        assert read_prompts(str(path), None) == [[user("red")]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("red")]}, "row 1 of .* has no teacher response"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "row 1 of .* has no prompt"),
        ({"instruction": " ", "output": "sun"}, "row 1 of .* has no prompt"),
        ({"instruction": "red"}, "no column 'teacher_response', only instruction"),
        ({"text": "red"}, "no column 'messages' or 'prompt' or 'conversations' or 'instruction'"),
    ],
)
def test_a_row_without_a_side_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        read_examples(str(path), DataSettings(train=str(path)))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    tiny.write_rows(tmp_path / "b" / "2.jsonl", [{"prompt": "blue"}])
    tiny.write_rows(tmp_path / "a.jsonl", [{"prompt": "red"}])
    (tmp_path / "README.md").write_text("notes")
    assert read_prompts(str(tmp_path), None) == [[user("red")], [user("blue")]]
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="both JSON and Parquet files"):
        read_prompts(str(tmp_path), None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        read_prompts(str(empty), None)


def test_duplicates_are_what_repeats_prompt_and_response() -> None:
    rows = [Example([user(p)], r) for p, r in [("a", "x"), ("a", "y"), ("a", "x"), ("b", "x")]]
    assert without_duplicates(rows) == [rows[0], rows[1], rows[3]]


def examples(*texts: str) -> list[Example]:
    return [Example([user(text)], "x") for text in texts]


def test_near_duplicates_are_counted_by_the_triples_they_share() -> None:
    held_out = examples("Why is the sky blue in the morning?", "red")
    train = examples(
        "why is the sky BLUE, in the morning",  # the same words
        "Tell me why is the sky blue in the morning?",  # 6 triples of 8
        "Why is the sea blue in the evening?",  # none but 'why is the'
        "Red!",
        "green",
    )
    assert count_near_duplicates(train, held_out, similarity=1.0) == 2
    assert count_near_duplicates(train, held_out, similarity=6 / 8) == 3
    assert count_near_duplicates(train, held_out, similarity=6 / 8 + 0.01) == 2
    assert count_near_duplicates(train, held_out, similarity=0.05) == 4


Answered = tuple[list[Message], str, tuple[str, ...]]


def fill(path: Path, rows: list[Answered]) -> None:
    with TeacherCache.open(path) as cache:
        for index, (messages, text, flags) in enumerate(rows):
            request = TeacherRequest("m", messages, {}, index)
            cache.put(request, TeacherResponse(text, flags=flags))


@pytest.fixture
def codec() -> TextCodec:
    return TextCodec(tiny.tokenizer(), source="tiny")


def settings(folder: Path, **changes: Any) -> DataSettings:
    values = {
        "teacher": f"cache:{folder / 'teacher.cache'}",
        "validation_fraction": 0.3,
        "max_prompt_tokens": 16,
        "max_response_tokens": 6,
    }
    return DataSettings.model_validate({**values, **changes})


def test_a_cache_alone_is_a_training_set(tmp_path: Path, codec: TextCodec) -> None:
    rows: list[Answered] = [([user(f"red {i}")], "sun sea", ()) for i in range(40)]
    rows[3] = ([user("red 3")], "sun", ("truncated",))
    rows[4] = ([user("red 4")], " ", ())
    fill(tmp_path / "teacher.cache", rows)
    prompts = load_prompt_set(settings(tmp_path), codec)
    assert len(prompts.train) + len(prompts.validation) == 38
    assert prompts.num_flagged == 2
    kept = load_prompt_set(settings(tmp_path, leave_out=[]), codec)
    assert kept.num_flagged == 1  # an empty response can never be trained on


def test_prompts_of_a_file_get_their_responses_from_the_cache(
    tmp_path: Path, codec: TextCodec
) -> None:
    rows = [
        ([system("brief"), user(f"red {i}")], f"sun {j}", ()) for i in range(30) for j in (0, 1)
    ]
    fill(tmp_path / "teacher.cache", [*rows, ([user("other")], "sea", ())])
    path = tiny.write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": f"red {i}"} for i in [*range(33), 0, 1]]
    )
    prompts = load_prompt_set(settings(tmp_path, train=str(path)), codec)
    encoded = [*prompts.train, *prompts.validation]
    # The student sees the prompt of the file, without the teacher's system prompt.
    assert {(e.example.messages[0]["content"], e.example.teacher_response) for e in encoded} == {
        (f"red {i}", f"sun {j}") for i in range(30) for j in (0, 1)
    }
    assert len(encoded) == 60
    assert all(len(e.example.messages) == 1 for e in encoded)
    assert prompts.num_unanswered == 3


def test_a_cache_without_any_of_the_prompts_is_told(tmp_path: Path, codec: TextCodec) -> None:
    fill(tmp_path / "teacher.cache", [([user("sea")], "sun", ())])
    path = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "red"}])
    with pytest.raises(DataError, match=r"answers none of the 1 prompts of data\.train"):
        load_prompt_set(settings(tmp_path, train=str(path)), codec)


def test_prompts_must_come_from_somewhere() -> None:
    with pytest.raises(ValueError, match="train is missing"):
        DataSettings()
    with pytest.raises(ValueError, match="train is missing"):
        DataSettings(teacher="collect:collect.toml")
    with pytest.raises(ValueError, match="should match pattern"):
        DataSettings(train="prompts.jsonl", teacher="teacher.cache")
