"""Rows told apart by their prompts: the split, duplicates, near-duplicates."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from gad_fast.records import Example, Message

_SHINGLE_WORDS = 3


def split_by_prompt(
    examples: Sequence[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
    """Train and validation part; equal prompts are on the same side, whatever else is there."""
    keys = [prompt_number(example.messages) for example in examples]
    train = [e for e, key in zip(examples, keys, strict=True) if key >= fraction]
    held_out = [(key, e) for e, key in zip(examples, keys, strict=True) if key < fraction]
    held_out.sort(key=lambda pair: pair[0])
    return train, [example for _, example in held_out]


def prompt_number(messages: Sequence[Message]) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """Examples without those that repeat both prompt and response of an earlier one."""
    first: dict[tuple[str, str], Example] = {}
    for example in examples:
        key = (json.dumps(example.messages, sort_keys=True), example.teacher_response)
        first.setdefault(key, example)
    return list(first.values())


def count_near_duplicates(
    train: Iterable[Example], validation: Iterable[Example], *, similarity: float
) -> int:
    """Training prompts that are nearly a validation prompt, equal ones included.

    Args:
        train: training part.
        validation: held-out part.
        similarity: Jaccard index of the sets of word triples, from which on two are alike; case
            and punctuation do not count. In (0, 1].

    Exact rather than by MinHash: the held-out part is small, so that an index of its triples is.
    """
    held_out = [_shingles(example.messages) for example in validation]
    holders: dict[str, list[int]] = defaultdict(list)
    for index, shingles in enumerate(held_out):
        for shingle in shingles:
            holders[shingle].append(index)
    return sum(
        _is_near(_shingles(example.messages), held_out, holders, similarity) for example in train
    )


def _is_near(
    shingles: set[str], held_out: list[set[str]], holders: dict[str, list[int]], similarity: float
) -> bool:
    shared = Counter(index for shingle in shingles for index in holders.get(shingle, ()))
    return any(
        count >= similarity * (len(shingles) + len(held_out[index]) - count)
        for index, count in shared.items()
    )


def _shingles(messages: Sequence[Message]) -> set[str]:
    """Word triples of the user's turns; the words themselves where there are fewer."""
    users = [turn["content"] for turn in messages if turn["role"] == "user"]
    words = re.findall(r"\w+", " ".join(users).casefold())
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(count)}
