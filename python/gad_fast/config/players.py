"""The two players."""

from __future__ import annotations

from typing import Literal

from gad_fast.config.base import Settings


class StudentSettings(Settings):
    """The model being distilled."""

    model: str
    """Folder or Hub id of a decoder-only model with a chat template."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored weights. bfloat16 weights lose small updates: prefer float32."""


class DiscriminatorSettings(Settings):
    """The scorer of (prompt, response), trained alongside the student."""

    model: str = "student"
    """`student` for a copy of the student's backbone, else a folder or Hub id of any other one.
    A backbone with a tokenizer of its own reads the same texts in its own tokens."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored backbone weights; the head is float32 at least."""
