"""The shapes that rows of chat data come in, and the prompt and response in a row of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gad_fast.errors import DataError
from gad_fast.records import Message

Row = dict[str, Any]

DEFAULT_RESPONSE_COLUMN = "teacher_response"
_SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a row has its prompt and its response."""

    columns: list[str]
    """What is read of a row."""
    prompt_column: str
    """Named in messages."""
    response_column: str
    """Named in messages."""
    prompt_of: Callable[[Row], list[Message] | None]
    """The chat before the response, or None if the row has none."""
    response_of: Callable[[Row], Any]
    """The response, or whatever is in its place."""


def detect(
    columns: Sequence[str], source: str, prompt_column: str | None, response_column: str | None
) -> Shape:
    """The shape of rows with these columns.

    `prompt` or `messages` with a column of responses; `messages` that end with the response;
    `conversations` as ShareGPT has them; `instruction`, `input`, `output` as Alpaca has them.

    Args:
        columns: names of the columns.
        source: named in messages.
        prompt_column: column with the prompt, where the recipe names it.
        response_column: column with the response, where the recipe names it.

    Raises:
        DataError: no shape fits; says which columns are there.
    """
    if prompt_column is not None:
        if prompt_column in columns:
            return _chat(prompt_column, response_column or DEFAULT_RESPONSE_COLUMN)
    else:
        for name, make in _BY_COLUMN.items():
            if name in columns:
                return make(columns, response_column)
    wanted = repr(prompt_column) if prompt_column else " or ".join(map(repr, _BY_COLUMN))
    raise DataError(
        f"{source} has no column {wanted}, only {', '.join(columns)} "
        f"(name the right one as prompt_column)"
    )


def _prompt(columns: Sequence[str], response_column: str | None) -> Shape:
    del columns
    return _chat("prompt", response_column or DEFAULT_RESPONSE_COLUMN)


def _messages(columns: Sequence[str], response_column: str | None) -> Shape:
    if response_column is not None or DEFAULT_RESPONSE_COLUMN in columns:
        return _chat("messages", response_column or DEFAULT_RESPONSE_COLUMN)
    return _dialogue("messages", lambda row: _turns(row["messages"]))


def _conversations(columns: Sequence[str], response_column: str | None) -> Shape:
    def turns(row: Row) -> list[Message] | None:
        return _share_gpt_turns(row["conversations"])

    shape = _dialogue("conversations", turns)
    if response_column is None and DEFAULT_RESPONSE_COLUMN not in columns:
        return shape
    name = response_column or DEFAULT_RESPONSE_COLUMN
    return Shape(
        ["conversations", name], "conversations", name, shape.prompt_of, lambda row: row[name]
    )


def _alpaca(columns: Sequence[str], response_column: str | None) -> Shape:
    name = response_column or ("output" if "output" in columns else DEFAULT_RESPONSE_COLUMN)
    used = [column for column in ("system", "instruction", "input") if column in columns]

    def prompt_of(row: Row) -> list[Message] | None:
        parts = [row.get("instruction"), row.get("input")]
        texts = [text for text in parts if isinstance(text, str) and text.strip()]
        if not texts:
            return None
        system = row.get("system")
        head = (
            [Message(role="system", content=system)] if isinstance(system, str) and system else []
        )
        return [*head, Message(role="user", content="\n".join(texts))]

    return Shape([*used, name], "instruction", name, prompt_of, lambda row: row[name])


_BY_COLUMN: dict[str, Callable[[Sequence[str], str | None], Shape]] = {
    "messages": _messages,
    "prompt": _prompt,
    "conversations": _conversations,
    "instruction": _alpaca,
}


def _chat(prompt_column: str, response_column: str) -> Shape:
    """A column with the prompt, as a text or turns, and one with the response."""

    def prompt_of(row: Row) -> list[Message] | None:
        value = row[prompt_column]
        if isinstance(value, str):
            return [Message(role="user", content=value)] if value.strip() else None
        return _turns(value)

    return Shape(
        [prompt_column, response_column],
        prompt_column,
        response_column,
        prompt_of,
        lambda row: row[response_column],
    )


def _dialogue(column: str, turns_of: Callable[[Row], list[Message] | None]) -> Shape:
    """A column of turns, the last of which is the response where it is the assistant's."""

    def prompt_of(row: Row) -> list[Message] | None:
        turns = turns_of(row) or []
        return (turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns) or None

    def response_of(row: Row) -> Any:
        turns = turns_of(row)
        return turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else None

    return Shape([column], column, column, prompt_of, response_of)


def _turns(value: Any) -> list[Message] | None:
    if not isinstance(value, list) or not value:
        return None
    turns = cast("list[Any]", value)
    if not all(_has_texts(turn, "role", "content") for turn in turns):
        return None
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def _share_gpt_turns(value: Any) -> list[Message] | None:
    if not isinstance(value, list) or not value:
        return None
    turns: list[Message] = []
    for turn in cast("list[Any]", value):
        if _has_texts(turn, "role", "content"):
            turns.append(Message(role=turn["role"], content=turn["content"]))
        elif _has_texts(turn, "from", "value") and turn["from"] in _SHARE_GPT_ROLES:
            turns.append(Message(role=_SHARE_GPT_ROLES[turn["from"]], content=turn["value"]))
        else:
            return None
    return turns


def _has_texts(turn: Any, *keys: str) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(cast("Row", turn).get(key), str) for key in keys
    )
