"""A child process: runs the cases of one section, and writes down each as soon as it has ended."""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_suite.cases import Case, Row
from gpu_suite.scale import SCALES

BROKEN_CONTEXT = 3
"""Exit code after which no further case can run in the process."""


class Task(NamedTuple):
    """What a child is asked to do; it travels as JSON."""

    section: str
    scale: str
    results: str
    """File with what the suite has found so far."""
    stream: str
    """File that lines are appended to."""
    done: list[str]
    """Cases that have run, in an earlier child perhaps."""
    until: float
    """Unix time after which no case starts."""


def work(task: Task) -> int:
    """Runs what is left of the section; a case leaves a line when it starts and when it ends."""
    scale = SCALES[task.scale]
    results = json.loads(Path(task.results).read_text())
    module = importlib.import_module(f"gpu_suite.{task.section}")
    cases: list[Case] = [c for c in module.cases(scale, results) if c.name not in task.done]
    for case in cases:
        _write(task, {"name": case.name, "status": "planned", "is_optional": case.is_optional})
    for case in cases:
        if time.time() > task.until:
            break
        _write(task, {"name": case.name, "status": "started"})
        _write(task, _ended(case))
        if scale.device == "cuda" and not _is_context_alive():
            status = "unavailable" if case.is_optional else "failed"
            reason = "the device does not answer after it"
            _write(task, {"name": case.name, "status": status, "reason": reason})
            os._exit(BROKEN_CONTEXT)  # the usual way out would hang in torch's own clean-up
    _write(task, {"name": "", "status": "end"})
    return 0


def _ended(case: Case) -> Row:
    start = time.perf_counter()
    try:
        rows = case.run()
    except torch.OutOfMemoryError as error:
        line = {"status": "skipped", "reason": f"does not fit: {_first_line(error)}", "rows": []}
    except Exception as error:
        status = "unavailable" if case.is_optional else "failed"
        reason = f"{type(error).__name__}: {_first_line(error)}"
        line = {"status": status, "reason": reason, "rows": [], "log": traceback.format_exc()}
    else:
        line = {"status": _status(rows), "rows": rows}
    gc.collect()
    return {"name": case.name, "seconds": time.perf_counter() - start, **line}


def _status(rows: list[Row]) -> str:
    return "failed" if any(row.get("passes") is False for row in rows) else "ok"


def _is_context_alive() -> bool:
    """Whether the device still answers: after an illegal access it never does."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _write(task: Task, line: dict[str, Any]) -> None:
    with Path(task.stream).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
