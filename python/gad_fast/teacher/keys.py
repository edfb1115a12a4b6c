"""API keys: read when a client is made, never stored, and taken out of every text that is shown."""

from __future__ import annotations

import os

from gad_fast.config import TeacherSettings
from gad_fast.errors import TeacherError

_NO_KEY = "none"  # the official client insists on one; local servers ask for none


def read_key(name: str, settings: TeacherSettings) -> str:
    """The key of a teacher, from its environment variable or its file.

    Args:
        name: what the recipe calls the teacher.
        settings: where the key is.

    Raises:
        TeacherError: the variable is not set, the file cannot be read, or either is empty. The
            message holds neither the variable's name nor its value, since a key is easily pasted
            in the place of a name.
    """
    if settings.api_key_env is not None:
        key, place = os.environ.get(settings.api_key_env), "the variable that api_key_env names"
    elif settings.api_key_file is not None:
        place = f"the file {settings.api_key_file}"
        try:
            key = settings.api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TeacherError(f"teachers.{name} has no key: cannot read {place}") from error
    else:
        return _NO_KEY
    if key is None or not key.strip():
        raise TeacherError(
            f"teachers.{name} has no key: {place} is not set or empty (export it in this shell)"
        )
    if not key.strip().isprintable() or not key.isascii():
        raise TeacherError(f"teachers.{name} has no key: {place} holds more than one line of ASCII")
    return key.strip()


def without_key(text: str, key: str) -> str:
    """A text of a server in one short line, with the key taken out where the server repeats it."""
    if key != _NO_KEY:
        text = text.replace(key, "[key]")
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + "..."
