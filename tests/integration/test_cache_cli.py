"""`gad-fast cache` as a user types it."""

import json
import sqlite3
from pathlib import Path

import datasets
import pytest

from gad_fast.cli.main import main
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse


def fill(path: Path, count: int = 5) -> None:
    with TeacherCache.open(path) as cache:
        for number in range(count):
            chat = [{"role": "user", "content": f"what is {number} + 1?"}]
            request = TeacherRequest("teacher-1", chat, {"temperature": 0.7})
            cache.put(request, TeacherResponse(f"It is {number + 1}.", "stop"))


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["cache", *map(str, words)])
    return int(stop.value.code or 0)


def test_info_and_verify_say_what_is_there(tmp_path, capsys):
    fill(tmp_path / "cache.db")
    assert run("info", tmp_path / "cache.db") == 0
    shown = capsys.readouterr().out
    assert "num responses    5" in shown
    assert "['teacher-1']" in shown
    assert run("verify", tmp_path / "cache.db") == 0
    assert "5 rows, all as they were stored" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_export_and_import_carry_everything_once(suffix, tmp_path, capsys):
    fill(tmp_path / "one.db")
    output = tmp_path / f"rows.{suffix}"
    assert run("export", tmp_path / "one.db", output) == 0
    assert "5 responses written" in capsys.readouterr().out
    assert run("import", tmp_path / "two.db", output) == 0
    assert "5 responses read" in (first := capsys.readouterr().out)
    assert "5 of them new" in first
    assert run("import", tmp_path / "two.db", output) == 0
    assert "0 of them new" in capsys.readouterr().out
    with (
        TeacherCache.open(tmp_path / "one.db", read_only=True) as one,
        TeacherCache.open(tmp_path / "two.db", read_only=True) as two,
    ):
        assert list(one) == list(two)
    if suffix == "jsonl":
        row = json.loads(output.read_text().splitlines()[0])
        assert row["messages"][0]["content"] == "what is 0 + 1?"
        assert row["teacher_response"] == "It is 1."


def test_damage_is_named_and_exits_with_2(tmp_path, capsys):
    fill(tmp_path / "cache.db")
    with sqlite3.connect(tmp_path / "cache.db") as file:
        file.execute("UPDATE responses SET finish_reason = 'length' WHERE id = 3")
    assert run("verify", tmp_path / "cache.db") == 2
    shown = capsys.readouterr()
    assert "3" in shown.out
    assert shown.err.startswith("gad-fast: 1 problems in 5 rows of ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere.db"], "nowhere.db"),
        (["import", "new.db", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["info"], "cache takes info CACHE"),
        (["drop", "cache.db"], "got drop cache.db"),
        ([], "got nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_for_other_trainers_end_with_the_unflagged_responses(suffix, tmp_path, capsys):
    fill(tmp_path / "cache.db", 3)
    with TeacherCache.open(tmp_path / "cache.db") as cache:
        request = TeacherRequest("teacher-1", [{"role": "user", "content": "cut?"}])
        cache.put(request, TeacherResponse("It is", "length", flags=("truncated",)))
    output = tmp_path / f"chats.{suffix}"
    assert run("export", tmp_path / "cache.db", output, "--shape", "messages") == 0
    assert "3 responses written" in capsys.readouterr().out
    kind = "json" if suffix == "jsonl" else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(output), split="train")
    assert rows.column_names == ["messages"]
    assert sorted(row[-1]["content"] for row in rows["messages"]) == [
        "It is 1.",
        "It is 2.",
        "It is 3.",
    ]
    assert [turn["role"] for turn in rows["messages"][0]] == ["user", "assistant"]
    # What was written is read again as a training set.
    assert run("import", tmp_path / "two.db", output, "--teacher", "me") == 0
    assert "3 of them new" in capsys.readouterr().out


def test_responses_that_a_user_has_are_imported_once(tmp_path, capsys):
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("a", "x"), ("c", "I'm sorry, I can't help.")]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "teacher_response": r}) + "\n" for p, r in rows)
    )
    assert run("import", tmp_path / "cache.db", path) == 2
    assert "row 1 of" in (message := capsys.readouterr().err)
    assert "has no teacher" in message
    assert "--teacher NAME" in message
    assert run("import", tmp_path / "cache.db", path, "--teacher", "gpt") == 0
    assert "4 responses read" in (first := capsys.readouterr().out)
    assert "4 of them new" in first
    assert run("import", tmp_path / "cache.db", path, "--teacher", "gpt") == 0
    assert "0 of them new" in capsys.readouterr().out
    with TeacherCache.open(tmp_path / "cache.db", read_only=True) as cache:
        stored = [(r.request.messages[0]["content"], r.request.sample_index) for r in cache]
        assert stored == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
        assert [row.response.flags for row in cache][-1] == ("refusal",)
