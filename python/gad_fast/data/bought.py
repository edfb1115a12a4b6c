"""Teacher responses out of a cache, joined with the prompts that they answer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gad_fast.config.data import ResponseFlag
from gad_fast.errors import DataError
from gad_fast.records import Example, Message
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.records import CachedResponse, TeacherResponse


@dataclass(frozen=True, slots=True)
class Bought:
    """Examples from a cache, and what was left out."""

    examples: list[Example]
    """A prompt with n usable responses is in n examples."""
    num_flagged: int
    """Responses left out for a flag."""
    num_unanswered: int
    """Prompts without any response in the cache."""


def read_cache(path: Path, leave_out: Sequence[ResponseFlag]) -> Bought:
    """All responses of a cache with the prompts as the teacher saw them.

    Raises:
        CacheError: there is no cache that can be read.
    """
    examples: list[Example] = []
    num_flagged = 0
    for row in _rows(path):
        if not is_usable(row.response, leave_out):
            num_flagged += 1
        else:
            examples.append(Example(_messages(row), row.response.text))
    return Bought(examples, num_flagged, num_unanswered=0)


def join_cache(
    path: Path, prompts: Iterable[Sequence[Message]], leave_out: Sequence[ResponseFlag]
) -> Bought:
    """The prompts with their responses; a system prompt that only the teacher saw is no obstacle.

    Raises:
        CacheError: there is no cache that can be read.
        DataError: the cache answers none of the prompts.
    """
    by_prompt: dict[str, Sequence[Message]] = {_key(prompt): prompt for prompt in prompts}
    answers: dict[str, list[TeacherResponse]] = defaultdict(list)
    for row in _rows(path):
        for key in _keys(_messages(row)):
            if key in by_prompt:
                answers[key].append(row.response)
                break
    if not answers:
        raise DataError(
            f"{path} answers none of the {len(by_prompt)} prompts of data.train (collect them: "
            f"gad-fast collect RECIPE.toml with prompts = the same file)"
        )
    examples = [
        Example(list(by_prompt[key]), answer.text)
        for key in by_prompt
        for answer in answers.get(key, ())
        if is_usable(answer, leave_out)
    ]
    num_responses = sum(map(len, answers.values()))
    return Bought(examples, num_responses - len(examples), len(by_prompt) - len(answers))


def is_usable(response: TeacherResponse, leave_out: Sequence[ResponseFlag]) -> bool:
    """Whether a response can be trained on: it says something, and has no unwanted flag."""
    return bool(response.text.strip()) and not set(response.flags) & set(leave_out)


def _rows(path: Path) -> Iterator[CachedResponse]:
    with TeacherCache.open(path, read_only=True) as cache:
        yield from cache


def _messages(row: CachedResponse) -> list[Message]:
    return [Message(role=turn["role"], content=turn["content"]) for turn in row.request.messages]


def _keys(messages: Sequence[Message]) -> Iterator[str]:
    yield _key(messages)
    if messages[0]["role"] == "system" and len(messages) > 1:
        yield _key(messages[1:])


def _key(messages: Sequence[Message]) -> str:
    return json.dumps(messages, sort_keys=True, ensure_ascii=False)
