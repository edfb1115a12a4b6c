"""Where a benchmark ran: processor, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "gad-fast", "numpy", "torch", "transformers", "peft", "tokenizers", "triton", "trl", "pyarrow",
)  # fmt: skip


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python's and those of every package that a benchmark measures or uses."""
    return {"python": platform.python_version()} | {
        name: installed_version(name) for name in _PACKAGES
    }


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    memory = Path("/proc/meminfo")
    total = memory.read_text().split(maxsplit=2)[1] if memory.exists() else None
    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "memory_gib": None if total is None else round(int(total) / 2**20, 1),
        "system": platform.platform(),
    }


def commit() -> dict[str, Any]:
    """Commit of the checkout that this package is imported from, and whether it was changed.

    Both None for an installed package, even where the environment lies inside a repository.
    """
    file = Path(__file__).resolve()
    if shutil.which("git") is None or _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return {"commit": None, "is_changed": None}
    changes = _git(file, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(file, "rev-parse", "HEAD"), "is_changed": bool(changes)}


def _git(file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(file.parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
