"""Which batches are under way, in a file beside the cache, so that no start submits them again."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from gad_fast.teacher.side_file import append_line, read_lines


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that was submitted, or was about to be when the collection ended."""

    label: str
    """Ours; the provider keeps it in the batch's metadata."""
    keys: frozenset[str]
    """Of its requests."""
    since: float
    """When it was noted, in seconds since 1970 UTC."""
    id: str | None = None
    """The provider's; None if a kill came between submitting it and noting that."""


class BatchLedger:
    """Notes each batch before and after it is submitted, and when it is done.

    Only the writer of the cache writes it.
    """

    def __init__(self, cache: Path) -> None:
        self._path = cache.with_name(cache.name + ".batches.jsonl")

    def open_batches(self, teacher: str) -> list[OpenBatch]:
        """Batches of a teacher that are not done, in their order."""
        batches: dict[str, OpenBatch] = {}
        for row in read_lines(self._path):
            label = row["label"]
            if row.get("teacher") == teacher:
                batches[label] = OpenBatch(label, frozenset(row["keys"]), row["since"])
            elif label in batches and "id" in row:
                before = batches[label]
                batches[label] = OpenBatch(label, before.keys, before.since, row["id"])
            elif label in batches and "done" in row:
                del batches[label]
        return list(batches.values())

    def begin(self, teacher: str, keys: frozenset[str]) -> OpenBatch:
        """Notes a batch that is about to be submitted."""
        batch = OpenBatch(secrets.token_hex(12), keys, time.time())
        row = {"label": batch.label, "teacher": teacher, "since": batch.since}
        append_line(self._path, {**row, "keys": sorted(keys)})
        return batch

    def submitted(self, batch: OpenBatch, batch_id: str) -> OpenBatch:
        """Notes the provider's id."""
        append_line(self._path, {"label": batch.label, "id": batch_id})
        return OpenBatch(batch.label, batch.keys, batch.since, batch_id)

    def done(self, batch: OpenBatch) -> None:
        """Notes that everything of a batch is in the cache, or that it never was submitted."""
        append_line(self._path, {"label": batch.label, "done": True})
