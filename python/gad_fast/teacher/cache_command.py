"""What `gad-fast cache info|verify|export|import` does, without its printing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gad_fast.errors import CacheError
from gad_fast.teacher import exchange
from gad_fast.teacher.cache import CacheInfo, TeacherCache, Verification


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    output: Path
    """The file."""
    num_rows: int
    """Its rows."""

    def __str__(self) -> str:
        return f"{self.num_rows} responses written to {self.output}"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import brought."""

    source: Path
    """The file."""
    num_rows: int
    """Its rows."""
    num_new: int
    """Those which the cache had not."""

    def __str__(self) -> str:
        return f"{self.num_rows} responses read from {self.source}, {self.num_new} of them new"


def info(path: Path) -> CacheInfo:
    """Sizes of the cache at `path`.

    Raises:
        CacheError: there is no cache that can be read.
    """
    return TeacherCache.open(path, read_only=True).info()


def verify(path: Path) -> Verification:
    """Checks the cache at `path`; the command should exit with 2 if there are problems.

    Raises:
        CacheError: there is no cache that can be read.
    """
    return TeacherCache.open(path, read_only=True).verify()


def export(path: Path, output: Path) -> Exported:
    """Writes the cache at `path` to a `.jsonl` or `.parquet` file.

    Raises:
        CacheError: there is no cache that can be read, or the file cannot be written.
    """
    return Exported(output, TeacherCache.open(path, read_only=True).export(output))


def export_messages(path: Path, output: Path) -> Exported:
    """Writes the unflagged responses of the cache at `path` as chats, for other trainers.

    Raises:
        CacheError: there is no cache that can be read, or the file cannot be written.
    """
    with TeacherCache.open(path, read_only=True) as cache:
        return Exported(output, exchange.export_messages(cache, output))


def import_(path: Path, source: Path) -> Imported:
    """Brings the rows of a `.jsonl` or `.parquet` file into the cache at `path`.

    The cache is made if it is not there; rows that it has stay as they are.

    Raises:
        CacheError: the file cannot be read, or the cache cannot be written.
    """
    if not source.is_file():
        raise CacheError(f"cannot read {source}: there is no such file")
    with TeacherCache.open(path) as cache:
        return Imported(source, *cache.import_(source))
