"""The journal of rollouts: what the engine has given since the last checkpoint, on the disk.

A file a step, of records of a length, a checksum and a payload in safetensors. A crash tears the
last record at most: reading ends there. What a failed engine had finished of a step stands in a
file of its own: to sample the rest beside other rollouts gives other roundings, so that a step that
was merely cut off is sampled anew, bit for bit as it was.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from gad_fast.records import EncodedExample, Group, Ids, Logprobs, Response
from gad_fast.run.complete import sync

_HEAD = struct.Struct("<IQ")
"""CRC-32 and length of the payload."""


@dataclass(frozen=True, slots=True)
class _Record:
    index: int
    prompt_ids: Ids
    rollouts: list[Response]
    logprobs: list[Logprobs] | None


class Journal:
    """Groups by step and by place of their prompt; on the disk when they are written."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "journal"

    def append(self, step: int, groups: Mapping[int, Group]) -> None:
        """Writes groups of a step down."""
        self._append(self._path(step), groups)

    def keep(self, step: int, groups: Mapping[int, Group]) -> None:
        """Writes down what an engine had finished of a step before it failed."""
        self._append(self._path_of_kept(step), groups)

    def load(self, step: int, prompts: Sequence[EncodedExample]) -> dict[int, Group]:
        """The journalled groups of a step; none of other prompts'."""
        return _load(self._path(step), prompts)

    def load_kept(self, step: int, prompts: Sequence[EncodedExample]) -> dict[int, Group]:
        """Likewise, of what was kept."""
        return _load(self._path_of_kept(step), prompts)

    def discard(self, step: int) -> None:
        """Removes what `append` has written of a step."""
        self._path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self, last_step: int) -> None:
        """Removes the steps up to `last_step`, which a checkpoint holds the outcome of."""
        for path in self._folder.glob("step-*"):
            if int(path.stem.removeprefix("step-")) <= last_step:
                path.unlink()

    def _append(self, path: Path, groups: Mapping[int, Group]) -> None:
        is_new_folder = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        with path.open("ab") as file:
            for index, group in groups.items():
                payload = _encode(index, group)
                file.write(_HEAD.pack(zlib.crc32(payload), len(payload)) + payload)
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder)
        if is_new_folder:
            sync(self._folder.parent)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.groups"

    def _path_of_kept(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.kept"


def _load(path: Path, prompts: Sequence[EncodedExample]) -> dict[int, Group]:
    found: dict[int, Group] = {}
    for record in _read(path):
        index = record.index
        if index < len(prompts) and np.array_equal(prompts[index].prompt_ids, record.prompt_ids):
            found[index] = Group(prompts[index], record.rollouts, record.logprobs)
    return found


def _encode(index: int, group: Group) -> bytes:
    lengths = [len(rollout) for rollout in group.rollouts]
    record: dict[str, NDArray[Any]] = {
        "index": np.array([index], dtype=np.int64),
        "prompt": np.ascontiguousarray(group.prompt.prompt_ids),
        "tokens": np.concatenate([rollout.ids for rollout in group.rollouts]),
        "lengths": np.array(lengths, dtype=np.int64),
        "finished": np.array([r.is_finished for r in group.rollouts], dtype=np.uint8),
    }
    if group.logprobs is not None:
        record["logprobs"] = np.concatenate(group.logprobs)
    return save(record)


def _read(path: Path) -> Iterator[_Record]:
    for payload in _payloads(path.read_bytes() if path.exists() else b""):
        record = load(payload)
        ends = np.cumsum(record["lengths"])[:-1]
        texts = np.split(record["tokens"], ends)
        logprobs = np.split(record["logprobs"], ends) if "logprobs" in record else None
        finished = record["finished"].astype(bool)
        rollouts = [Response(t, bool(f)) for t, f in zip(texts, finished, strict=True)]
        yield _Record(int(record["index"][0]), record["prompt"], rollouts, logprobs)


def _payloads(data: bytes) -> Iterator[bytes]:
    start = 0
    while start + _HEAD.size <= len(data):
        checksum, length = _HEAD.unpack_from(data, start)
        payload = data[start + _HEAD.size : start + _HEAD.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload
        start += _HEAD.size + length
