"""The teacher cache from Python: what it keeps, how it is shared, and what it refuses."""

import asyncio
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gad_fast.errors import CacheCorruptError, CacheError, CacheLockedError, GadFastError
from gad_fast.teacher import cache_command
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse


def request(index: int, **changes: Any) -> TeacherRequest:
    values: dict[str, Any] = {
        "teacher": "gpt-5-chat",
        "messages": [{"role": "user", "content": f"Why is {index} odd? ü👩‍👩‍👧"}],
        "sampling": {"temperature": 0.7, "max_tokens": 512},
    }
    return TeacherRequest(**(values | changes))


def response(index: int) -> TeacherResponse:
    return TeacherResponse(
        f"{index} is odd, since it leaves 1 when halved.\n" * (1 + index % 7),
        finish_reason="stop",
        num_prompt_tokens=10 + index,
        num_response_tokens=None,
        cost=0.1 + index / 3,
        created=1_700_000_000.125 + index,
        flags=("checked", "short") if index % 2 else (),
    )


def fill(cache: TeacherCache, count: int) -> None:
    assert cache.put_many([(request(i), response(i)) for i in range(count)]) == [True] * count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.cache"


def test_a_response_comes_back_whole(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        assert cache.put(request(1), response(1)) is True
        assert cache.put(request(1), response(2)) is False
        assert cache.get(request(1)) == response(1)
        assert request(1) in cache
        assert request(2) not in cache
        assert cache.get(request(2)) is None
        assert len(cache) == 1
    reader = TeacherCache.open(path, read_only=True)
    assert reader.get(request(1)) == response(1)
    assert [(row.id, row.request, row.response) for row in reader] == [(1, request(1), response(1))]


def test_several_responses_to_a_prompt_differ_by_sample_index(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        for index in range(5):
            assert cache.put(request(0, sample_index=index), response(index))
        assert [cache.get(request(0, sample_index=i)) for i in range(5)] == [
            response(i) for i in range(5)
        ]
        assert cache.info().num_prompts == 1


@pytest.mark.parametrize(
    "same",
    [
        {"sampling": {"max_tokens": 512.0, "temperature": 0.7}},
        {"sampling": {"max_tokens": 512, "temperature": 7e-1}},
        {"messages": ({"content": "Why is 3 odd? ü👩‍👩‍👧", "role": "user"},)},
    ],
)
def test_spelling_does_not_make_a_request_new(same: dict[str, Any]) -> None:
    assert request(3, **same).key == request(3).key


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": "gpt-5"},
        {"sample_index": 1},
        {"sampling": {"max_tokens": 512}},
        {"sampling": {"max_tokens": 512, "temperature": math.nextafter(0.7, 1)}},
        {"sampling": {"max_tokens": "512", "temperature": 0.7}},
        {"messages": [{"role": "user", "content": "Why is 3 odd? u\u0308👩‍👩‍👧"}]},
        {"messages": [{"role": "system", "content": "Why is 3 odd? ü👩‍👩‍👧"}]},
    ],
)
def test_every_part_makes_a_request_new(other: dict[str, Any]) -> None:
    assert request(3, **other).key != request(3).key


def test_iteration_goes_on_after_a_row(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        fill(cache, 700)
        first = [row for row, _ in zip(cache, range(300), strict=False)]
        rest = list(cache.rows(after=first[-1].id))
        assert [row.request for row in first + rest] == [request(i) for i in range(700)]


def test_64_threads_put_at_once(path: Path) -> None:
    with TeacherCache.open(path) as cache, ThreadPoolExecutor(64) as pool:
        outcomes = list(
            pool.map(lambda i: cache.put(request(i % 500), response(i % 500)), range(1000))
        )
        assert sum(outcomes) == len(cache) == 500
        assert all(cache.get(request(i)) == response(i) for i in range(500))


def test_64_tasks_put_at_once_in_two_loops(path: Path) -> None:
    async def put_all(cache: TeacherCache, start: int) -> int:
        puts = [cache.aput(request(start + i), response(start + i)) for i in range(64)]
        return sum(await asyncio.gather(*puts))

    with TeacherCache.open(path) as cache:
        assert asyncio.run(put_all(cache, 0)) == 64
        assert asyncio.run(put_all(cache, 32)) == 32
        assert len(cache) == 96


def test_an_asynchronous_put_ends_in_an_error_of_the_package(path: Path) -> None:
    async def put(cache: TeacherCache, index: int) -> bool:
        return await cache.aput(request(index), response(index))

    cache = TeacherCache.open(path)

    async def put_close_put() -> None:
        pending = [asyncio.ensure_future(put(cache, index)) for index in range(8)]
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        cache.close()
        assert all(await asyncio.gather(*pending))
        with pytest.raises(CacheError, match="is closed"):
            await put(cache, 9)

    asyncio.run(put_close_put())
    with pytest.raises(CacheError, match="to read only"):
        asyncio.run(put(TeacherCache.open(path, read_only=True), 10))
    assert len(cache) == 8


def test_a_cancelled_put_leaves_the_others_alone(path: Path) -> None:
    async def put_and_cancel(cache: TeacherCache) -> None:
        puts = [asyncio.ensure_future(cache.aput(request(i), response(i))) for i in range(10)]
        await asyncio.sleep(0)
        puts[3].cancel()
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        assert isinstance(outcomes.pop(3), asyncio.CancelledError)
        assert outcomes == [True] * 9

    with TeacherCache.open(path) as cache:
        asyncio.run(put_and_cancel(cache))


def test_the_second_writer_is_told_the_first(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        with pytest.raises(CacheLockedError, match=rf"process {os.getpid()} .*read only"):
            TeacherCache.open(path)
        cache.put(request(0), response(0))
        with TeacherCache.open(path, read_only=True) as reader:
            assert len(reader) == 1
    TeacherCache.open(path).close()


def test_errors_are_the_users_to_mend() -> None:
    assert issubclass(CacheCorruptError, CacheError)
    assert issubclass(CacheLockedError, CacheError)
    assert issubclass(CacheError, GadFastError)


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE a (b)")
    connection.close()


def newer_cache(path: Path) -> None:
    TeacherCache.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(b"remember the milk" * 1000), "is no teacher cache"),
        (other_database, "another program's"),
        (newer_cache, r"format 3, .* up to 2 \(upgrade"),
        (lambda path: path.mkdir(), "no file"),
        (lambda path: os.mkfifo(path), "no file"),
    ],
)
def test_what_is_no_cache_is_refused_by_name(path: Path, make: Any, expected: str) -> None:
    make(path)
    for read_only in (False, True):
        with pytest.raises(CacheError, match=expected) as caught:
            TeacherCache.open(path, read_only=read_only)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_cache_that_is_not_there_cannot_be_read(path: Path) -> None:
    with pytest.raises(CacheError, match="no such file"):
        TeacherCache.open(path, read_only=True)
    with pytest.raises(CacheError, match="cannot open"):
        TeacherCache.open(path / "deeper")
    assert not path.exists()


@pytest.mark.parametrize(
    ("asked", "answer", "expected"),
    [
        (request(0, messages=[]), response(0), "messages cannot be stored"),
        (request(0, messages="hi"), response(0), "messages cannot be stored"),
        (request(0, messages=["hi"]), response(0), "messages cannot be stored"),
        (request(0, sampling=[]), response(0), "sampling cannot be stored"),
        (request(0, sampling={"top_p": float("nan")}), response(0), "must be JSON"),
        (request(0, sampling={"stop": b"x"}), response(0), "must be JSON"),
        (request(0, sample_index=-1), response(0), "sample_index must be"),
        (request(0, sample_index=2**32), response(0), "sample_index must be"),
        (request(0, teacher="\ud800"), response(0), "lone surrogate"),
        (request(0, messages=[{"content": "\ud800"}]), response(0), "lone surrogate"),
        (request(0), TeacherResponse("\udfff"), "lone surrogate"),
        (request(0), TeacherResponse("", cost=math.inf), "cost cannot be stored"),
        (request(0), TeacherResponse("", created=math.nan), "created cannot be stored"),
        (request(0), TeacherResponse("", num_prompt_tokens=-1), "must be at least 0"),
        (request(0), TeacherResponse("", num_prompt_tokens=2**70), "64 bits"),
    ],
)
def test_hostile_values_are_refused(
    path: Path, asked: TeacherRequest, answer: TeacherResponse, expected: str
) -> None:
    with TeacherCache.open(path) as cache:
        with pytest.raises(CacheError, match=expected):
            cache.put(asked, answer)
        with pytest.raises(CacheError, match=expected):
            asyncio.run(cache.aput(asked, answer))
        assert len(cache) == 0


def test_deep_nesting_is_refused(path: Path) -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    with TeacherCache.open(path) as cache, pytest.raises(CacheError):
        cache.put(request(0, sampling={"x": deep}), response(0))


@pytest.mark.parametrize("depth", [1, 61, 62, 63, 64, 65, 100])
def test_a_nested_value_has_one_key_whichever_encoder_reads_it(depth: int) -> None:
    class Mapping(dict):  # no exact built-in type: Python's encoder reads it
        pass

    value: Any = {"b": [1, 2.5, None, True, "é\n"], "a": -(2**63)}
    for level in range(depth):
        value = {"x": value} if level % 2 else [value]
    ours, pythons = request(0, sampling={"x": value}), request(0, sampling=Mapping(x=value))
    assert ours.key == pythons.key


def test_a_chat_of_many_turns_comes_back(path: Path) -> None:
    turns = [{"role": "user", "content": f"turn {i}", "score": i / 7} for i in range(50_000)]
    with TeacherCache.open(path) as cache:
        assert cache.put(request(0, messages=turns), response(0))
        assert asyncio.run(cache.aput(request(0, messages=turns), response(1))) is False
        (row,) = cache
    assert row.request.messages == turns
    assert row.response == response(0)


def test_a_chat_longer_than_a_row_may_be_is_refused(path: Path) -> None:
    turns = [{"role": "user", "content": "x" * 2**16}] * 2**10
    with TeacherCache.open(path) as cache:
        with pytest.raises(CacheError, match="messages cannot be stored: it has 67"):
            cache.put(request(0, messages=turns), response(0))
        assert len(cache) == 0


def test_texts_of_all_kinds_come_back(path: Path) -> None:
    texts = ["", "\x00", "a\r\n", "👩‍👩‍👧‍👦" * 1000, "e\u0301 é", "x" * 3_000_000, '"\\\u2028']
    with TeacherCache.open(path) as cache:
        for index, text in enumerate(texts):
            asked = request(index, messages=[{"role": "user", "content": text, "n": [None, 1.5]}])
            cache.put(asked, TeacherResponse(text))
            stored = cache.get(asked)
            assert stored is not None
            assert stored.text == text
        assert [row.request.messages[0]["content"] for row in cache] == texts


def test_damage_is_named(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        fill(cache, 5)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE responses SET cost = 5 WHERE id = 3")
    connection.close()
    cache = TeacherCache.open(path, read_only=True)
    with pytest.raises(CacheCorruptError, match="row 3"):
        cache.get(request(2))
    with pytest.raises(CacheCorruptError, match="row 3"):
        list(cache)
    assert cache.get(request(1)) == response(1)
    verification = cache.verify()
    assert verification.num_rows == 5
    assert [line.split(":")[0] for line in verification.problems] == ["row 3"]


def test_a_sound_cache_has_no_problems(path: Path) -> None:
    with TeacherCache.open(path, compression="none") as cache:
        fill(cache, 300)
        assert (cache.verify().num_rows, cache.verify().problems) == (300, [])
    # Plain text is there for any tool.
    connection = sqlite3.connect(path)
    (text,) = connection.execute("SELECT data FROM responses WHERE id = 4").fetchone()
    connection.close()
    assert text == response(3).text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_export_and_import_are_inverse_and_idempotent(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / "first.cache", tmp_path / "second.cache"
    exports = [tmp_path / f"{index}{suffix}" for index in range(3)]
    with TeacherCache.open(first) as cache:
        fill(cache, 300)
        cache.put(
            request(7, messages=[{"role": "user", "content": [{"type": "text"}]}]), response(1)
        )
        cache.put(request(8, sampling={"stop": ["\n", "</s>"], "seed": 2**63}), response(2))
        rows = list(cache)
    assert str(cache_command.export(first, exports[0])).startswith("302 responses written to")
    cache_command.export(first, exports[1])
    imported = cache_command.import_(second, exports[0])
    assert (imported.num_rows, imported.num_new) == (302, 302)
    imported = cache_command.import_(second, exports[0])
    assert (imported.num_rows, imported.num_new) == (302, 0)
    cache_command.export(second, exports[2])

    assert list(TeacherCache.open(second, read_only=True)) == rows
    contents = {export.read_bytes() for export in exports}
    assert len(contents) == 1
    assert cache_command.verify(second).problems == []
    assert {path.suffix for path in tmp_path.iterdir()} <= {suffix, ".cache", ".cache-lock"} | {
        ".cache-wal",
        ".cache-shm",
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_export_is_a_training_set(tmp_path: Path, suffix: str) -> None:
    from gad_fast.config import DataSettings
    from gad_fast.data.reading import read_examples

    output = tmp_path / f"train{suffix}"
    with TeacherCache.open(tmp_path / "cache") as cache:
        fill(cache, 3)
        assert cache.export(output) == 3
    examples = read_examples(str(output), DataSettings(train=str(output)))
    assert [example.teacher_response for example in examples] == [
        response(i).text for i in range(3)
    ]
    assert examples[1].messages == request(1).messages


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 of .* is no JSON"),
        ("[" * 100_000, "line 2 of .* is no JSON"),
        ("[]", "line 2 of .* is no JSON object"),
        ("\xff\xfe", "line 2 of .* is no JSON"),
        ('{"teacher": 1}', "row 2 of .* has no teacher"),
        (
            '{"teacher": "t", "messages": "hi", "teacher_response": ""}',
            "row 2 of .* has no messages",
        ),
        ('{"teacher": "t", "messages": [{}]}', "row 2 of .* has no teacher_response"),
        ('{"teacher": "t", "messages": [], "teacher_response": ""}', "messages cannot be stored"),
        ('{"teacher": "t", "messages": [{}], "teacher_response": "", "cost": "1"}', "cost '1'"),
        ('{"teacher": "t", "messages": [{}], "teacher_response": "", "cost": NaN}', "cost cannot"),
        ('{"teacher": "t", "messages": [{}], "teacher_response": "", "flags": [1]}', "flags"),
        (
            '{"teacher": "t", "messages": [{}], "teacher_response": "", "sample_index": true}',
            "True",
        ),
        ('{"teacher": "\\ud800", "messages": [{}], "teacher_response": ""}', "lone surrogate"),
    ],
)
def test_a_malformed_import_names_the_line(tmp_path: Path, line: str, expected: str) -> None:
    source = tmp_path / "rows.jsonl"
    good = {
        "teacher": "t",
        "messages": [{"role": "user", "content": "hi"}],
        "teacher_response": "ho",
    }
    source.write_bytes(json.dumps(good).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(CacheError, match=expected):
        cache_command.import_(tmp_path / "cache", source)


def test_files_that_cannot_be_exchanged_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with TeacherCache.open(tmp_path / "cache") as cache:
        with pytest.raises(CacheError, match=r"must end in .jsonl or .parquet"):
            cache.export(tmp_path / "rows.csv")
        with pytest.raises(CacheError, match="cannot write"):
            cache.export(tmp_path / "none" / "rows.jsonl")
        for source in (broken, tmp_path / "none.jsonl"):
            with pytest.raises(CacheError, match="cannot read"):
                cache.import_(source)
    with pytest.raises(CacheError, match="no such file"):
        cache_command.import_(tmp_path / "new.cache", tmp_path / "none.jsonl")
    assert not (tmp_path / "new.cache").exists()


def test_info_tells_the_sizes(path: Path) -> None:
    with TeacherCache.open(path) as cache:
        fill(cache, 10)
        cache.put(request(0, teacher="other"), response(0))
    info = cache_command.info(path)
    assert (info.path, info.format_version) == (path, 2)
    assert (info.num_responses, info.num_prompts) == (11, 10)
    assert info.teachers == ["gpt-5-chat", "other"]
    assert not info.has_dictionary
    assert info.num_bytes >= path.stat().st_size > 0


FORK = """
import os, sys, threading
from gad_fast.errors import CacheError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

def request(index):
    return TeacherRequest("t", [{"role": "user", "content": str(index)}])

cache = TeacherCache.open(sys.argv[1])
cache.put(request(0), TeacherResponse("zero"))
assert cache.get(request(0)).text == "zero"
stop = threading.Event()

def put_until_stopped(first):
    index = first
    while not stop.is_set():
        cache.put(request(index), TeacherResponse("x" * 500))
        assert cache.contains(request(index))
        index += 4

threads = [threading.Thread(target=put_until_stopped, args=(1 + i,)) for i in range(4)]
[thread.start() for thread in threads]
for _ in range(25):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert cache.get(request(0)).text == "zero"
            assert len(cache) > 0
            try:
                cache.put(request(-1), TeacherResponse(""))
            except CacheError as error:
                code = 0 if f"opened by process {os.getppid()}" in str(error) else 3
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[thread.join() for thread in threads]
cache.put(request(-2), TeacherResponse("after"))
cache.close()
assert TeacherCache.open(sys.argv[1], read_only=True).verify().problems == []
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is of POSIX")
def test_a_forked_process_reads_and_leaves_writing_to_its_parent(path: Path) -> None:
    # In a process of its own: this one may have threads of other libraries, which a fork loses.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(path)],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_interrupts_a_check(path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def verify_until_interrupted() -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        while True:
            cache.verify()

    with TeacherCache.open(path) as cache:
        fill(cache, 10)
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                verify_until_interrupted()
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert cache.verify().problems == []
