"""What the figures were taken on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from gad_fast import kernels
from gpu_suite.cases import Case, Results, Row
from gpu_suite.scale import Scale

_PACKAGES = (
    "gad-fast", "torch", "triton", "transformers", "numpy",
    "liger-kernel", "trl", "cut-cross-entropy",
)  # fmt: skip
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"


def cases(scale: Scale, results: Results) -> list[Case]:
    """Versions, the device, its clocks, and the commit."""
    del results
    return [
        Case("versions", lambda: [_versions()]),
        Case("device", lambda: [_device(scale)]),
        Case("checkout", lambda: [_checkout()]),
    ]


def _versions() -> Row:
    found = {name: _version(name) for name in _PACKAGES}
    return {**found, "python": platform.python_version(), "kernels": str(kernels.__file__)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(scale: Scale) -> Row:
    if scale.device == "cpu":
        return {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
        **_driver(),
    }


def _driver() -> Row:
    """What nvidia-smi reads; settings are looked at, never changed."""
    if shutil.which("nvidia-smi") is None:
        return {"driver": None}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0 or not done.stdout:
        return {"driver": None}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return {"driver": dict(zip(_QUERY.split(","), values, strict=True))}


def _checkout() -> Row:
    """Commit of the benchmark's checkout, and whether files differ from it; None without git."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return {"commit": None}
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return {"commit": commit, "is_changed": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
