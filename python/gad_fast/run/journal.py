"""The journal of rollouts: what the engine has given since the last checkpoint, on the disk.

A file a step, of records of a length, a checksum and a payload in safetensors. A crash tears the
last record at most: reading ends there.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
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
    """Groups by step; `append` returns when they are on the disk."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "journal"

    def append(self, step: int, groups: Sequence[Group], *, first: int = 0) -> None:
        """Writes groups of a step down.

        Args:
            step: the step that they are for.
            groups: whole groups.
            first: place of the first among the step's prompts; the others follow it.
        """
        is_new_folder = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        path = self._path(step)
        with path.open("ab") as file:
            for index, group in enumerate(groups, start=first):
                payload = _encode(index, group)
                file.write(_HEAD.pack(zlib.crc32(payload), len(payload)) + payload)
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder)
        if is_new_folder:
            sync(self._folder.parent)

    def load(self, step: int, prompts: Sequence[EncodedExample]) -> dict[int, Group]:
        """The journalled groups of a step by place of their prompt; none of other prompts'."""
        found: dict[int, Group] = {}
        for record in _read(self._path(step)):
            index = record.index
            if index < len(prompts) and np.array_equal(
                prompts[index].prompt_ids, record.prompt_ids
            ):
                found[index] = Group(prompts[index], record.rollouts, record.logprobs)
        return found

    def discard(self, step: int) -> None:
        """Removes what is there of a step."""
        self._path(step).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self, last_step: int) -> None:
        """Removes the steps up to `last_step`, which a checkpoint holds the outcome of."""
        for path in self._folder.glob("step-*.groups"):
            if int(path.stem.removeprefix("step-")) <= last_step:
                path.unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.groups"


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
