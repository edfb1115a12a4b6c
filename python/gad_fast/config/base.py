"""What every section of a recipe is, and how a document of sections is read from TOML.

A mistake is told in one line: the key, what came, what is allowed.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from gad_fast.errors import ConfigError


class Settings(BaseModel):
    """A frozen section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Document(Settings):
    """Settings that fill a file of their own."""

    noun: ClassVar[str] = "document"
    """What error messages call it."""

    @classmethod
    def from_toml(cls, path: str | Path, *, overrides: dict[str, Any] | None = None) -> Self:
        """Reads a TOML file; paths in it are relative to the working directory.

        Args:
            path: the file.
            overrides: nested values that replace the file's.

        Raises:
            ConfigError: the file is missing, is not TOML, or does not describe a valid document.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {cls.noun} {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_values(_merged(values, overrides or {}), source=str(path))

    @classmethod
    def from_values(cls, values: dict[str, Any], *, source: str = "recipe") -> Self:
        """Builds the document from nested dictionaries, with all problems told in one line.

        Raises:
            ConfigError: an unknown key (with the nearest right one), a wrong type or range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_describe(error, cls)}") from error


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Values with overrides laid over them, section by section."""
    result = dict(values)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], cast("dict[str, Any]", value))
        else:
            result[key] = value
    return result


def _describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for all that a validation found: key, what came, what is allowed."""
    return "; ".join(_describe_one(dict(problem), root) for problem in error.errors())


def _describe_one(problem: dict[str, Any], root: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key, message, came = ".".join(path), str(problem["msg"]), problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            allowed = _section(root, path[:-1]).model_fields
            near = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            return f"unknown key {key!r}, {hint}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            message = message.removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
        case _:
            return f"{key}: {message[:1].lower()}{message[1:]}, got {came!r}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The settings class that stands at a path of keys."""
    keys = iter(path)
    for key in keys:
        annotation = root.model_fields[key].annotation
        if get_origin(annotation) is dict:
            next(keys)  # the name of one of many sections
            annotation = get_args(annotation)[1]
        assert isinstance(annotation, type), annotation
        assert issubclass(annotation, BaseModel), annotation
        root = annotation
    return root
