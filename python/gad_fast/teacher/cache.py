"""The teacher cache: a response that was acknowledged is never bought again, nor lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from gad_fast import _core
from gad_fast.errors import CacheCorruptError, CacheError, CacheLockedError
from gad_fast.teacher import exchange
from gad_fast.teacher.records import (
    CachedResponse,
    TeacherRequest,
    TeacherResponse,
    from_core_request,
    from_core_response,
    to_core_request,
    to_core_response,
)

_ROWS_AT_ONCE = 256

# A child of fork must not find a lock of the cache held by a thread that it does not have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_core.cache_before_fork,
        after_in_parent=_core.cache_after_fork,
        after_in_child=_core.cache_after_fork,
    )


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Sizes of a cache."""

    path: Path
    """The file."""
    format_version: int
    """Version of the layout."""
    num_responses: int
    """Rows."""
    num_prompts: int
    """Different chats among the requests."""
    teachers: list[str]
    """Names of the teachers, sorted."""
    has_dictionary: bool
    """Whether a compression dictionary was trained, which takes 1000 rows."""
    num_bytes: int
    """Bytes on disk, the write-ahead log included."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a check of a whole cache found."""

    num_rows: int
    """Rows that were checked."""
    problems: list[str]
    """What is wrong, a line each, with the number of the row where it is in one."""


class TeacherCache:
    """Responses of teachers, in one SQLite file; shared between threads and event loops.

    A put returns after the row is on the disk itself; callers that put at once share one flush.
    One process writes at a time, any number read. A forked process can read, and must leave
    writing to its parent; a fork waits until no thread is inside a cache. The file must be on a
    local disk: on a network file system, a write-ahead log can lose rows.
    """

    def __init__(self, core: _core.Cache, path: Path) -> None:
        self.path = path
        self._core = core
        self._desks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Desk] = (
            weakref.WeakKeyDictionary()
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        compression: Literal["zstd", "none"] = "zstd",
    ) -> Self:
        """Opens a cache, and makes it if it is not there.

        Args:
            path: the file; `-wal`, `-shm` and `-lock` files appear beside it.
            read_only: the file must be there; another process may be writing to it.
            compression: how texts are stored from now on. `none` takes about 2.5 times the space
                and keeps them readable by every tool that opens SQLite.

        Raises:
            CacheLockedError: another process, which the message names, writes to it.
            CacheError: the file is no cache, of a newer format, on a network file system, or
                cannot be opened.
        """
        with _TRANSLATED:
            if read_only:
                core = _core.Cache.open_read_only(path)
            else:
                core = _core.Cache.open(path, compression=compression)
        return cls(core, Path(path))

    def put(self, request: TeacherRequest, response: TeacherResponse) -> bool:
        """Stores a response and returns after it is on disk: whether the request was new.

        Of equal requests, the first response stays.

        Raises:
            CacheError: it is not on disk: the disk is full, the cache is closed or opened to read,
                or a value cannot be stored.
        """
        with _TRANSLATED:
            return self._core.put(to_core_request(request), to_core_response(response))

    def put_many(self, rows: Iterable[tuple[TeacherRequest, TeacherResponse]]) -> list[bool]:
        """Stores responses and returns after all are on disk: which of the requests were new.

        Raises:
            CacheError: as `put`; rows before the one that failed may be on disk.
        """
        with _TRANSLATED:
            return self._core.put_many([(to_core_request(r), to_core_response(a)) for r, a in rows])

    async def aput(self, request: TeacherRequest, response: TeacherResponse) -> bool:
        """As `put`, without holding up the event loop.

        A put that is cancelled may still reach the disk.
        """
        loop = asyncio.get_running_loop()
        desk = self._desks.get(loop)
        if desk is None:
            desk = self._desks[loop] = _Desk(self._core, loop)
        with _TRANSLATED:
            return await desk.put(request, response)

    def get(self, request: TeacherRequest) -> TeacherResponse | None:
        """The response to a request, or None.

        Raises:
            CacheCorruptError: what is stored is not what was.
        """
        with _TRANSLATED:
            response = self._core.get(to_core_request(request))
        return None if response is None else from_core_response(response)

    def contains(self, request: TeacherRequest) -> bool:
        """Whether a response to the request was stored."""
        with _TRANSLATED:
            return self._core.contains(to_core_request(request))

    def __contains__(self, request: TeacherRequest) -> bool:
        return self.contains(request)

    def __len__(self) -> int:
        with _TRANSLATED:
            return len(self._core)

    def __iter__(self) -> Iterator[CachedResponse]:
        return self.rows()

    def rows(self, *, after: int = 0) -> Iterator[CachedResponse]:
        """Rows in the order in which they were stored, those included that come meanwhile.

        Args:
            after: the `id` of the last row that was seen, to go on from there.

        Raises:
            CacheCorruptError: a row is not what was stored.
        """
        while True:
            with _TRANSLATED:
                rows = self._core.rows_after(after, _ROWS_AT_ONCE)
            if not rows:
                return
            for after, request, response in rows:
                yield CachedResponse(
                    after, from_core_request(request), from_core_response(response)
                )

    def info(self) -> CacheInfo:
        """Sizes of the cache."""
        with _TRANSLATED:
            return CacheInfo(self.path, *self._core.info())

    def verify(self) -> Verification:
        """Checks the structure of the database, then every row against its hashes."""
        with _TRANSLATED:
            return Verification(*self._core.verify())

    def export(self, output: str | os.PathLike[str]) -> int:
        """Writes all rows to a `.jsonl` or `.parquet` file, and gives their number.

        The file is a training set too: prompts in `messages`, responses in `teacher_response`. It
        appears when it is whole; the same rows give the same bytes.

        Raises:
            CacheError: the name ends in something else, or the file cannot be written.
        """
        return exchange.export_rows(iter(self), Path(output))

    def import_(self, source: str | os.PathLike[str]) -> tuple[int, int]:
        """Stores the rows of an exported file; those that are there already stay as they are.

        Returns:
            The number of rows in the file, and how many of them were new.

        Raises:
            CacheError: the file cannot be read or a row, which the message names, is malformed; the
                rows before it are stored.
        """
        num_rows = num_new = 0
        rows = exchange.import_rows(Path(source))
        while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            num_rows += len(batch)
            num_new += sum(self.put_many(batch))
        return num_rows, num_new

    def close(self) -> None:
        """Returns after everything is on disk and the cache is free; reading goes on."""
        self._core.close()
        for loop, desk in list(self._desks.items()):
            # A closed loop has let go of its files already.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(desk.retire, loop)
        self._desks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Desk:
    """Puts of one event loop that are not answered yet."""

    def __init__(self, core: _core.Cache, loop: asyncio.AbstractEventLoop) -> None:
        # No reference to the loop: the cache keeps a desk for as long as its loop lives.
        self._core = core
        self._mailbox = _core.Mailbox()
        self._tokens = itertools.count()
        self._futures: dict[int, asyncio.Future[bool]] = {}
        loop.add_reader(self._mailbox.fileno(), self._deliver)

    def put(self, request: TeacherRequest, response: TeacherResponse) -> asyncio.Future[bool]:
        token = next(self._tokens)
        self._core.put_soon(
            to_core_request(request), to_core_response(response), self._mailbox, token
        )
        # Not too late: the outcome is delivered by the loop, which this call holds.
        future = self._futures[token] = asyncio.get_running_loop().create_future()
        return future

    def retire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Delivers what came, and is no more."""
        self._deliver()
        loop.remove_reader(self._mailbox.fileno())

    def _deliver(self) -> None:
        for token, outcome in self._core.drain(self._mailbox):
            future = self._futures.pop(token, None)
            if future is None or future.done():
                continue
            if isinstance(outcome, bool):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)


class _Translated:
    """Errors of the core as errors of the package."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _core.CacheCorruptError):
            raise CacheCorruptError(str(error)) from error
        if isinstance(error, _core.CacheLockedError):
            raise CacheLockedError(str(error)) from error
        if isinstance(error, _core.CacheError):
            raise CacheError(str(error)) from error
        if isinstance(error, UnicodeError):
            raise CacheError(
                f"a text holds a lone surrogate, which no UTF-8 text can: {error} (repair it with "
                f'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))'
            ) from error
        if isinstance(error, OverflowError):
            raise CacheError(
                f"sample_index must be from 0 to 4294967295 and token counts fit 64 bits: {error}"
            ) from error


_TRANSLATED = _Translated()
