"""Generative Adversarial Distillation of language models from teachers that only give text.

The public names are loaded when they are first used: `import gad_fast` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gad_fast import kernels
    from gad_fast._core import RolloutBuffer
    from gad_fast.config import Recipe
    from gad_fast.teacher.cache import TeacherCache
    from gad_fast.text import TextCodec
    from gad_fast.training import Summary, train

__all__ = [
    "Recipe",
    "RolloutBuffer",
    "Summary",
    "TeacherCache",
    "TextCodec",
    "kernels",
    "train",
]

_HOMES = {
    "Recipe": "gad_fast.config",
    "RolloutBuffer": "gad_fast._core",
    "Summary": "gad_fast.training",
    "TeacherCache": "gad_fast.teacher.cache",
    "TextCodec": "gad_fast.text",
    "train": "gad_fast.training",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("gad_fast.kernels")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
