"""Every kernel under compute-sanitizer, where it is installed: memory errors, and races.

The interpreter that tests run in is sequential and reads out of bounds without a word, so that
neither can show there.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from gpu_suite import sanitizer_target
from gpu_suite.cases import Case, Results, Row
from gpu_suite.scale import Scale

_TOOLS = ("memcheck", "racecheck")
_CUDA_BIN = "/usr/local/cuda/bin"
_TIMEOUT_SECONDS = 45
# "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)".
_SUMMARY = re.compile(r"SUMMARY: (\d+)")


def cases(scale: Scale, results: Results) -> list[Case]:
    """The target on its own, then under each tool."""
    del results
    return [
        Case("without a tool", lambda: [_bare(scale)]),
        *(Case(tool, functools.partial(_check, tool, scale)) for tool in _TOOLS),
    ]


def _bare(scale: Scale) -> Row:
    ran = sanitizer_target.run_all(sanitizer_target.small(scale))
    return {"tool": None, "operations": ran}


def _check(tool: str, scale: Scale) -> list[Row]:
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), _CUDA_BIN))
    program = shutil.which("compute-sanitizer", path=places)
    if program is None or scale.device == "cpu":
        return [{"tool": tool, "state": "absent"}]
    command = [program, "--tool", tool, "--print-limit", "5", sys.executable, _target(), "full"]
    # A process group of its own, so that the tool's own child ends with it.
    process = subprocess.Popen(
        command,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [{"tool": tool, "state": f"no end in {_TIMEOUT_SECONDS} s"}]
    return [{"tool": tool, **verdict(output, process.returncode)}]


def verdict(output: str, return_code: int) -> Row:
    """What a tool's output says; a run that ended without a summary, or badly, does not pass."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    if not counts or (return_code != 0 and counts[-1] == 0):
        return {"state": "broken", "log": output[-2000:], "passes": False}
    if counts[-1] > 0:
        log = [line for line in output.splitlines() if line.startswith("=========")]
        return {"state": f"{counts[-1]} errors", "log": log[:40], "passes": False}
    return {"state": "clean", "passes": True}


def _target() -> str:
    return str(Path(sanitizer_target.__file__))


def _environment() -> dict[str, str]:
    # torch's caching allocator hands out parts of large blocks, whose ends no tool can see.
    folder = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
