"""The teacher cache against what one writes by hand: durable responses a second, and bytes on disk.

Question: what does it cost that a paid response is never lost? 64 callers wait for their own row to
be on disk before they go on, as the callers of an API do. The peers are a JSONL file with an fsync
a row and Python's sqlite3 with a commit a row (WAL, synchronous=FULL), each in a plain loop on one
thread: their best case, since callers who wait for a lock only add to it. Every side turns the same
request and response into what it stores within its time; turns alternate in this process.

Bytes are compared with the JSONL file of the same rows, all metadata included. A cache trains its
compression dictionary on its first 1000 rows; both figures, before and after, are given.

The text is data/quickstart.jsonl, varied: sentences of its responses in a new order, with half of
the words replaced by others of the corpus, so that no dictionary can hold the sentences. With the
dictionary such a text takes 0.36 of its size, as real responses do (0.36); without it 0.54, where
real ones, which repeat themselves more, take 0.44. It is not real text, and the sizes of a real
collection will differ.

    python benchmarks/cache.py [--smoke] [--folder DISK] [--output benchmarks/results/cache.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

Rows = list[tuple[TeacherRequest, TeacherResponse]]

NUM_CALLERS = 64
TEXT_BYTES = 2300
NUM_TRAINING_ROWS = 1000
RATE_GOAL, SIZE_GOAL = 10.0, 0.45
SEED = 0
CORPUS = Path(__file__).parent.parent / "data" / "quickstart.jsonl"


def corpus() -> tuple[list[str], list[str]]:
    """Prompts, and sentences of the responses."""
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    sentences = [
        sentence
        for row in rows
        for sentence in re.split(r"(?<=[.!?:])\s+", row["teacher_response"])
        if sentence
    ]
    return [row["prompt"] for row in rows], sentences


def make_rows(num_rows: int, replaced: float) -> Rows:
    """Requests of different prompts, with responses of about `TEXT_BYTES`."""
    prompts, sentences = corpus()
    words = " ".join(sentences).split()
    generator = random.Random(SEED)

    def vary(text: str) -> str:
        return " ".join(
            generator.choice(words) if generator.random() < replaced else word
            for word in text.split()
        )

    def write() -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < TEXT_BYTES:
            parts.append(vary(generator.choice(sentences)))
        return " ".join(parts)

    rows: Rows = []
    for index in range(num_rows):
        prompt = f"{vary(generator.choice(prompts))} ({index})"
        text = write()
        request = TeacherRequest(
            "gpt-5-chat-latest",
            [{"role": "user", "content": prompt}],
            {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1536},
        )
        response = TeacherResponse(
            text,
            finish_reason="stop",
            num_prompt_tokens=len(prompt) // 4,
            num_response_tokens=len(text) // 4,
            cost=round(len(text) * 2.5e-6, 6),
            created=1_764_000_000 + index / 16,
        )
        rows.append((request, response))
    return rows


def to_json(request: TeacherRequest, response: TeacherResponse) -> str:
    """The line that the peers store: what an export of the cache has."""
    return json.dumps(
        {
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
        },
        ensure_ascii=False,
    )


def jsonl_fsync(path: Path, rows: Rows) -> float:
    """Seconds to append rows to a file, each flushed to disk."""
    with path.open("ab", buffering=0) as file:
        start = time.perf_counter()
        for request, response in rows:
            file.write(to_json(request, response).encode() + b"\n")
            os.fsync(file.fileno())
        return time.perf_counter() - start


def sqlite3_commit(path: Path, rows: Rows) -> float:
    """Seconds to insert rows with Python's sqlite3, each in a transaction."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE responses (request TEXT PRIMARY KEY, row TEXT NOT NULL)")
    start = time.perf_counter()
    for request, response in rows:
        key = json.dumps([request.teacher, request.messages, request.sampling], sort_keys=True)
        connection.execute(
            "INSERT OR IGNORE INTO responses VALUES (?, ?)", (key, to_json(request, response))
        )
    seconds = time.perf_counter() - start
    connection.close()
    return seconds


def cache_tasks(path: Path, rows: Rows) -> float:
    """Seconds to put rows from 64 tasks of one event loop."""

    async def call(cache: TeacherCache, mine: Iterator[Any]) -> None:
        for request, response in mine:
            await cache.aput(request, response)

    async def call_all(cache: TeacherCache) -> float:
        start = time.perf_counter()
        shared = iter(rows)
        await asyncio.gather(*(call(cache, shared) for _ in range(NUM_CALLERS)))
        return time.perf_counter() - start

    with TeacherCache.open(path) as cache:
        return asyncio.run(call_all(cache))


def cache_threads(path: Path, rows: Rows) -> float:
    """Seconds to put rows from 64 threads."""

    def call(mine: Rows) -> None:
        for request, response in mine:
            cache.put(request, response)

    with TeacherCache.open(path) as cache:
        parts = [rows[caller::NUM_CALLERS] for caller in range(NUM_CALLERS)]
        threads = [threading.Thread(target=call, args=(part,)) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


def cache_one(path: Path, rows: Rows) -> float:
    """Seconds to put rows from one caller, who has every flush to himself."""
    with TeacherCache.open(path) as cache:
        start = time.perf_counter()
        for request, response in rows:
            cache.put(request, response)
        return time.perf_counter() - start


# Each side, and the part of the rows that it gets: one that flushes for every row needs fewer.
SIDES: dict[str, tuple[Callable[[Path, Rows], float], int]] = {
    "jsonl_fsync": (jsonl_fsync, 10),
    "sqlite3_commit": (sqlite3_commit, 10),
    "cache_tasks": (cache_tasks, 1),
    "cache_threads": (cache_threads, 1),
    "cache_one": (cache_one, 10),
}


def check(folder: Path, rows: Rows) -> None:
    """Every side keeps every row whole."""
    cache_tasks(folder / "check.cache", rows)
    with TeacherCache.open(folder / "check.cache", read_only=True) as cache:
        assert all(cache.get(request) == response for request, response in rows)
        assert cache.export(folder / "check.jsonl") == len(rows)
    exported = map(json.loads, (folder / "check.jsonl").read_text(encoding="utf-8").splitlines())
    # As values: the cache writes keys in its own order.
    by_time = sorted(exported, key=lambda row: row["created"])
    assert by_time == [json.loads(to_json(*row)) for row in rows]


def measure_rates(folder: Path, rows: Rows, repeats: int) -> dict[str, list[float]]:
    """Rows a second of every side, turn by turn; the files are new in each."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(-1, repeats):
        for name, (side, part) in SIDES.items():
            mine = rows[: len(rows) // part]
            rate = len(mine) / side(folder / f"{turn}.{name}", mine)
            if turn >= 0:  # the one before is the warm-up
                rates[name].append(rate)
    return rates


def measure_sizes(folder: Path, rows: Rows) -> dict[str, float]:
    """Bytes of a closed cache over those of the JSONL file, of the first and of all later rows."""
    path = folder / "sizes.cache"
    first, later = rows[:NUM_TRAINING_ROWS], rows[NUM_TRAINING_ROWS:]
    with TeacherCache.open(path) as cache:
        cache.put_many(first)
    before = path.stat().st_size
    with TeacherCache.open(path) as cache:
        has_dictionary = cache.info().has_dictionary
        cache.put_many(later)
    after = path.stat().st_size
    raw = [sum(len(to_json(*row).encode()) + 1 for row in part) for part in (first, later)]
    return {
        "num_rows": len(rows),
        "has_dictionary": has_dictionary,
        "without_dictionary": before / raw[0],
        "with_dictionary": (after - before) / raw[1] if later else float("nan"),
        "all": after / sum(raw),
    }


def flush_milliseconds(folder: Path) -> float:
    """Median time of an fsync after an append of 4 kB: what no durable row can be faster than."""
    times = []
    with (folder / "flush").open("ab", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def summarize(rates: dict[str, list[float]], sizes: dict[str, float]) -> dict[str, Any]:
    """Medians of the ratios of each turn, with their spread."""
    ratios: dict[str, Any] = {}
    for ours in ("cache_tasks", "cache_threads", "cache_one"):
        for peer in ("jsonl_fsync", "sqlite3_commit"):
            turns = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
            ratios[f"{ours} / {peer}"] = {
                "median": statistics.median(turns),
                "least": min(turns),
                "most": max(turns),
            }
    return {"rows_per_second": rates, "ratios": ratios, "size_over_jsonl": sizes}


def main() -> None:
    """Print the ratios; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--replaced", type=float, default=0.5, help="part of words replaced")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--smoke", action="store_true", help="few rows, once")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.num_rows, arguments.repeats = 640, 1
    rows = make_rows(arguments.num_rows, arguments.replaced)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        check(folder, rows[:500])
        flush = flush_milliseconds(folder)
        sizes = measure_sizes(folder, rows)
        figures = summarize(measure_rates(folder, rows, arguments.repeats), sizes)

    print(f"an fsync takes {flush:.3f} ms here")
    for side, rates in figures["rows_per_second"].items():
        print(f"{side:16} {statistics.median(rates):10.0f} durable rows/s")
    for pair, ratio in figures["ratios"].items():
        goal = "" if "one" in pair else f", goal >= {RATE_GOAL:.0f}"
        spread = f"{ratio['least']:.1f} to {ratio['most']:.1f}"
        print(f"{pair:32} x{ratio['median']:.1f} ({spread}{goal})")
    print(
        f"size / JSONL: {sizes['all']:.3f} of {sizes['num_rows']} rows (goal <= {SIZE_GOAL}); "
        f"first {NUM_TRAINING_ROWS} {sizes['without_dictionary']:.3f}, "
        f"then {sizes['with_dictionary']:.3f}"
    )
    if arguments.output:
        record = {
            "question": (__doc__ or "").splitlines()[0],
            "seed": SEED,
            "replaced": arguments.replaced,
            "num_rows": arguments.num_rows,
            "num_callers": NUM_CALLERS,
            "fsync_milliseconds": flush,
            "processor": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "sqlite3_of_python": sqlite3.sqlite_version,
            **figures,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
