"""`gad-fast cache`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from gad_fast.errors import CacheCorruptError, ConfigError


def cache(words: list[str]) -> None:
    """Tells about a cache of teacher responses, and moves rows in and out."""
    # Imported here: reading data files takes pyarrow, which help does not need.
    from gad_fast.teacher import cache_command

    match words:
        case ["info", path]:
            for name, value in asdict(cache_command.info(Path(path))).items():
                print(f"{name.replace('_', ' '):16} {value}")  # noqa: T201
        case ["verify", path]:
            verification = cache_command.verify(Path(path))
            for problem in verification.problems:
                print(problem)  # noqa: T201
            if verification.problems:
                raise CacheCorruptError(
                    f"{len(verification.problems)} problems in {verification.num_rows} rows of "
                    f"{path} (export what can be read, and import it into a new cache)"
                )
            print(f"{verification.num_rows} rows, all as they were stored")  # noqa: T201
        case ["export", path, output]:
            print(cache_command.export(Path(path), Path(output)))  # noqa: T201
        case ["export", path, output, "--shape", "messages"]:
            print(cache_command.export_messages(Path(path), Path(output)))  # noqa: T201
        case ["import", path, source]:
            print(cache_command.import_(Path(path), Path(source)))  # noqa: T201
        case ["import", path, source, "--teacher", teacher]:
            from gad_fast.data.importing import import_examples

            print(import_examples(Path(path), source, teacher))  # noqa: T201
        case _:
            raise ConfigError(
                f"cache takes info CACHE, verify CACHE, export CACHE OUTPUT [--shape messages] or "
                f"import CACHE SOURCE [--teacher NAME], got {' '.join(words) or 'nothing'}"
            )
