"""What a collection asks: each prompt, so many times, of the teacher that its text decides."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gad_fast.config import CollectRecipe, TeacherSettings
from gad_fast.records import Message
from gad_fast.teacher.records import TeacherRequest

Chat = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and which of the recipe's teachers it is for."""

    teacher: str
    """What the recipe calls the teacher."""
    request: TeacherRequest


def questions(recipe: CollectRecipe, prompts: Sequence[Chat]) -> Iterator[Question]:
    """All requests of a collection, in the order of the prompts; equal prompts once."""
    seen: set[bytes] = set()
    sampling = {name: teacher.sampling for name, teacher in recipe.teachers.items()}
    for prompt in prompts:
        digest = _digest(prompt)
        if digest in seen:
            continue
        seen.add(digest)
        for sample_index in range(recipe.responses_per_prompt):
            name = _assigned(recipe.teachers, digest, sample_index)
            teacher = recipe.teachers[name]
            messages = with_system_prompt(prompt, teacher.system_prompt)
            yield Question(
                name, TeacherRequest(teacher.model, messages, sampling[name], sample_index)
            )


def with_system_prompt(prompt: Chat, system_prompt: str | None) -> list[Message]:
    """A chat as it is sent: a system turn of its own stays, and is the only one."""
    if system_prompt is None or prompt[0]["role"] in ("system", "developer"):
        return list(prompt)
    return [Message(role="system", content=system_prompt), *prompt]


def _assigned(teachers: Mapping[str, TeacherSettings], digest: bytes, sample_index: int) -> str:
    """The teacher of a response, by weighted rendezvous hashing.

    A teacher that is added takes its share from each of the others; no response moves between
    those that were there.

    Source: Schindelhauer and Schomaker, Weighted distributed hash tables, SPAA 2005, the
    logarithmic method.
    """
    if len(teachers) == 1:
        return next(iter(teachers))

    def distance(name: str) -> float:
        text = digest + sample_index.to_bytes(4, "big") + name.encode("utf-8")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return -math.log((number + 1) / (2**64 + 1)) / teachers[name].weight

    return min(teachers, key=distance)


def _digest(prompt: Chat) -> bytes:
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
