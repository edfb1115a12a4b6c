"""Collections small enough for a test, against a scripted server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chat_server import ChatServer
from gad_fast.config import CollectRecipe
from gad_fast.records import Message

QUICK_RETRY = {"first_wait_seconds": 0.001, "longest_wait_seconds": 0.002}


def recipe(folder: Path, server: ChatServer | str, **changes: Any) -> CollectRecipe:
    """A recipe with one teacher `a`; `teacher` changes it, other keys the recipe."""
    url = server if isinstance(server, str) else server.url
    teacher = {"model": "scripted", "base_url": url, "concurrency": 4, **changes.pop("teacher", {})}
    values: dict[str, Any] = {
        "prompts": str(folder / "prompts.jsonl"),
        "cache": folder / "teacher.cache",
        "teachers": {"a": teacher},
        "retry": QUICK_RETRY,
    }
    return CollectRecipe.from_values({**values, **changes})


def chats(count: int) -> list[list[Message]]:
    """Prompts `q 0`, `q 1`, and so on."""
    return [[Message(role="user", content=f"q {index}")] for index in range(count)]
