"""The teacher cache against what one writes by hand: durable responses a second, and bytes on disk.

Question: what does it cost that a paid response is never lost? 64 callers wait for their own row to
be on disk before they go on, as the callers of an API do. The peers are a JSONL file with an fsync
a row and Python's sqlite3 with a commit a row (WAL, synchronous=FULL), each in a plain loop on one
thread: their best case, since callers who wait for a lock only add to it. Every side turns the same
request and response into what it stores within its time; turns alternate in this process.

Bytes are compared with the JSONL file of the same rows, all metadata included. A cache trains its
compression dictionary on its first 1000 rows; the figures before and after are given too.

The text is Python's manual, varied: its sentences in a new order, with half of the words replaced
by others of it, so that no dictionary can hold the sentences. It is not real text, and the sizes of
a real collection will differ.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from gad_fast.bench import english
from gad_fast.bench.cache_sides import NUM_CALLERS, SIDES, Rows, cache_tasks, to_json
from gad_fast.bench.report import Comparison, Report
from gad_fast.errors import CacheError
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

TEXT_CHARACTERS = 2300
PROMPT_CHARACTERS = 110
NUM_TRAINING_ROWS = 1000
REPLACED = 0.5
RATE_GOAL, SIZE_GOAL = 10.0, 0.45
SEED = 0

NAMES = {
    "cache_tasks": f"{NUM_CALLERS} tasks",
    "cache_threads": f"{NUM_CALLERS} threads",
    "cache_one": "one caller",
}
PEERS = {"jsonl_fsync": "JSONL + fsync", "sqlite3_commit": "sqlite3 + commit"}


def run(folder: Path | None, *, quick: bool) -> Report:
    """Puts rows with all sides in turns; fails unless each keeps every row whole.

    Args:
        folder: on the disk to measure; None for the system's temporary folder.
        quick: few rows, once.

    Raises:
        CacheError: the folder is not there, or no place for a cache.
    """
    if folder is not None and not folder.is_dir():
        raise CacheError(f"there is no folder {folder} (make it, or name another with --folder)")
    num_rows, repeats = (640, 1) if quick else (20_000, 5)
    rows = make_rows(num_rows)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        check(place, rows[:500])
        flush = flush_milliseconds(place)
        sizes = measure_sizes(place, rows)
        rates = measure_rates(place, rows, repeats)
    return Report(
        name="cache",
        is_quick=quick,
        question="How many responses a second reach the disk, and how large are they there?",
        settings={
            "num_rows": num_rows,
            "num_callers": NUM_CALLERS,
            "replaced": REPLACED,
            "seed": SEED,
            "sqlite3_of_python": sqlite3.sqlite_version,
            "fsync_milliseconds": flush,
        },
        comparisons=[*_rate_comparisons(rates), _size_comparison(sizes, num_rows)],
        samples={"rows_per_second": rates, "size_over_jsonl": sizes},
        remarks=[
            f"an fsync takes {flush:.3f} ms here",
            *(f"size of {part}: {size:.3f} of JSONL" for part, size in sizes.items()),
        ],
    )


def make_rows(num_rows: int) -> Rows:
    """Requests of different prompts, with responses of about `TEXT_CHARACTERS`."""
    sentences = english.sentences()
    words = " ".join(sentences).split()
    generator = random.Random(SEED)

    def vary(text: str) -> str:
        return " ".join(
            generator.choice(words) if generator.random() < REPLACED else word
            for word in text.split()
        )

    def write(num_characters: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < num_characters:
            parts.append(vary(generator.choice(sentences)))
        return " ".join(parts)

    return [
        _row(f"{write(PROMPT_CHARACTERS)} ({index})", write(TEXT_CHARACTERS), index)
        for index in range(num_rows)
    ]


def _row(prompt: str, text: str, index: int) -> tuple[TeacherRequest, TeacherResponse]:
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
    return request, response


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
    """Bytes of a closed cache over those of the JSONL file: of all, of the first and later rows."""
    path = folder / "sizes.cache"
    first, later = rows[:NUM_TRAINING_ROWS], rows[NUM_TRAINING_ROWS:]
    with TeacherCache.open(path) as cache:
        cache.put_many(first)
    before = path.stat().st_size
    with TeacherCache.open(path) as cache:
        cache.put_many(later)
    after = path.stat().st_size
    raw = [sum(len(to_json(*row).encode()) + 1 for row in part) for part in (first, later)]
    sizes = {"all rows": after / sum(raw), f"the first {len(first)} rows": before / raw[0]}
    if later:
        sizes[f"the later {len(later)} rows"] = (after - before) / raw[1]
    return sizes


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


def _rate_comparisons(rates: dict[str, list[float]]) -> list[Comparison]:
    return [
        Comparison(
            case=f"{name}, {statistics.median(rates[ours]):.0f}/s",
            peer=f"{peer_name}, {statistics.median(rates[peer]):.0f}/s",
            ratios=[a / b for a, b in zip(rates[ours], rates[peer], strict=True)],
            goal=None if ours == "cache_one" else RATE_GOAL,
        )
        for ours, name in NAMES.items()
        for peer, peer_name in PEERS.items()
    ]


def _size_comparison(sizes: dict[str, float], num_rows: int) -> Comparison:
    return Comparison(
        case=f"size of {num_rows} rows",
        peer="the same rows as JSONL",
        of="bytes",
        ratios=[sizes["all rows"]],
        goal=SIZE_GOAL,
    )
