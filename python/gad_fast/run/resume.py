"""Where a run starts: anew, or where an unfinished one in the same folder has got to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from gad_fast.config import Recipe
from gad_fast.errors import CheckpointError, RunFolderError
from gad_fast.records import EncodedExample
from gad_fast.run.checkpoint import newest_complete
from gad_fast.run.folder import SUMMARY, RunFolder

MAY_CHANGE = (
    "name",
    "output",
    "run",
    "health",
    "hardware",
    "game.steps",
    "game.epochs",
    "batch.tokens_per_micro_batch",
    "rollout.max_sequences",
    "rollout.max_cached_tokens",
    "rollout.probe_every",
    "rollout.timeout_seconds",
)
"""Keys and sections in which a recipe may differ from that of the run it goes on with."""
KEEPS_ROLLOUTS = ("name", "output", "run", "rollout")
"""Those in which it may differ, and what was sampled is still what it asks for."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a run begins."""

    is_new: bool
    checkpoint: Path | None = None
    """What it goes on from; None when it begins at step 0."""
    keeps_rollouts: bool = True
    """What the journal holds is what the recipe asks for, so that it is not sampled again."""


def find_start(recipe: Recipe, *, resume: bool | None, say: Callable[[str], None]) -> Start:
    """Looks at the run folder; creates nothing.

    Args:
        recipe: what is to be run.
        resume: True only goes on, False only starts anew, None does what the folder is fit for.
        say: told which checkpoint is taken, and which are passed over.

    Raises:
        RunFolderError: the folder is in use by something else, or not fit for `resume`.
        CheckpointError: the recipe differs from that of the run in what must not change.
    """
    path = recipe.output
    if resume is False or not (path / "recipe.json").is_file():
        if resume:
            raise RunFolderError(f"output {path} holds no run to resume (leave --resume away)")
        RunFolder.require_free(path)
        return Start(is_new=True)
    if (path / SUMMARY).exists():
        raise RunFolderError(
            f"output {path} already holds the finished run {_stored(path).name!r} "
            f"(choose another with --output, or remove the folder)"
        )
    stored = _stored(path)
    _require_same(stored, recipe)
    checkpoint = newest_complete(path, say)
    where = f"from {checkpoint.name}" if checkpoint else "from the start: it has no checkpoint yet"
    say(f"going on with the run in {path} {where}")
    keeps_rollouts = all(_is_in(key, KEEPS_ROLLOUTS) for key, _, _ in _changes(stored, recipe))
    return Start(is_new=False, checkpoint=checkpoint, keeps_rollouts=keeps_rollouts)


def data_digest(examples: Iterable[EncodedExample]) -> str:
    """A hash of prompts and teacher responses in tokens, in their order."""
    state = hashlib.blake2b(digest_size=16)
    for example in examples:
        for ids in (example.prompt_ids, example.teacher.ids):
            state.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return state.hexdigest()


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` of every key that differs and must not."""
    return [
        f"{key}: {before!r} -> {after!r}"
        for key, before, after in _changes(old, new)
        if not _is_in(key, MAY_CHANGE)
    ]


def _require_same(old: Recipe, new: Recipe) -> None:
    changed = differences(old, new)
    if changed:
        raise CheckpointError(
            f"the run in {new.output} was started with another recipe: {'; '.join(changed)} "
            f"(put these back, or choose another --output; free to change are "
            f"{', '.join(MAY_CHANGE)})"
        )


def _stored(path: Path) -> Recipe:
    try:
        return Recipe.model_validate_json((path / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path}/recipe.json is not a recipe of this version (choose another --output)"
        ) from error


def _changes(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Key, value before and value after of all that differs."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    pairs = ((key, before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys()))
    return [(key, was, is_now) for key, was, is_now in pairs if was != is_now]


def _is_in(key: str, allowed: Sequence[str]) -> bool:
    """Whether it is one of the allowed keys, or in one of the allowed sections."""
    return any(key == one or key.startswith(one + ".") for one in allowed)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
