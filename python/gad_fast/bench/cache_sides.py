"""Ways to make responses durable: the cache's, and what one writes by hand."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.exchange import to_row
from gad_fast.teacher.records import TeacherRequest, TeacherResponse

NUM_CALLERS = 64

Rows = list[tuple[TeacherRequest, TeacherResponse]]


def to_json(request: TeacherRequest, response: TeacherResponse) -> str:
    """The line that the peers store: what an export of the cache has."""
    return json.dumps(to_row(request, response), ensure_ascii=False)


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
