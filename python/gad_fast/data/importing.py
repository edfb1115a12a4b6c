"""Responses that a user has already, brought into a cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from gad_fast.config import DataSettings
from gad_fast.data.reading import read_examples
from gad_fast.data.split import without_duplicates
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.cache_command import Imported
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.teacher.remarks import flags_of


def import_examples(path: Path, source: str, teacher: str) -> Imported:
    """Stores prompts and responses of any shape that training reads, as those of a teacher.

    The n-th response to a prompt in the source is its n-th sample, so that a second import of the
    same rows brings nothing.

    Args:
        path: the cache; it is made if it is not there.
        source: file, folder or Hub id.
        teacher: name of who wrote the responses.

    Raises:
        DataError: the source cannot be read, or a row lacks a side; nothing is stored.
        CacheError: the cache cannot be written.
    """
    examples = without_duplicates(read_examples(source, DataSettings(train=source)))
    num_before: Counter[str] = Counter()
    rows: list[tuple[TeacherRequest, TeacherResponse]] = []
    for example in examples:
        key = json.dumps(example.messages, sort_keys=True)
        request = TeacherRequest(teacher, example.messages, {}, num_before[key])
        num_before[key] += 1
        text = example.teacher_response
        rows.append((request, TeacherResponse(text, flags=flags_of(text, None, None, None))))
    with TeacherCache.open(path) as cache:
        return Imported(Path(source), len(rows), sum(cache.put_many(rows)))
