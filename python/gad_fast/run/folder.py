"""The run folder: recipe, metrics, samples, checkpoints and the final models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from gad_fast.config import Recipe
from gad_fast.errors import RunFolderError


class RunFolder:
    """Owns a new folder; `metrics.jsonl` and `samples.jsonl` are flushed with every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, TextIO] = {}

    @staticmethod
    def require_free(path: Path) -> None:
        """Raises RunFolderError when a run could not start in `path`; creates nothing."""
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"output {path} is a file (choose another output)")
        if path.exists() and any(path.iterdir()):
            raise RunFolderError(
                f"output {path} already holds {_holder(path)} "
                f"(choose another with --output, or remove the folder)"
            )
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise RunFolderError(f"output {path} cannot be written: no permission in {parent}")

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """Makes the folder and writes the resolved recipe into it."""
        cls.require_free(recipe.output)
        recipe.output.mkdir(parents=True, exist_ok=True)
        text = recipe.model_dump_json(indent=2) + "\n"
        (recipe.output / "recipe.json").write_text(text, encoding="utf-8")
        return cls(recipe.output)

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        self._append("metrics.jsonl", values)

    def write_sample(self, values: dict[str, Any]) -> None:
        """Appends a line to samples.jsonl."""
        self._append("samples.jsonl", values)

    def close(self) -> None:
        """Closes the open files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, values: dict[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = (self.path / name).open("a", encoding="utf-8")
        file = self._files[name]
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
        file.flush()


def _holder(path: Path) -> str:
    try:
        name = json.loads((path / "recipe.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return "other files"
    return f"the run {name!r}"
