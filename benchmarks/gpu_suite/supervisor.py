"""A section in child processes: after one that dies, another without the case that it died of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_suite.cases import Results, Row

# What a case may take beyond the end of its section before its process is ended.
_GRACE_SECONDS = 15.0
_MAX_CHILDREN = 5


class Section(NamedTuple):
    """Name of its module, and by when in the whole run it must have ended."""

    name: str
    ends_at_seconds: float


class Child(NamedTuple):
    """How a child is started."""

    command: list[str]
    environment: dict[str, str]


class Ending(NamedTuple):
    """How a child ended."""

    is_late: bool
    log: str


def run_section(
    section: Section, scale: str, results: Results, child: Child, *, until: float
) -> Row:
    """All cases of a section: those that ran, failed, or found no time, and why.

    Args:
        section: what to run.
        scale: name of the sizes.
        results: what the suite has found so far, for the child to read.
        child: how to start one.
        until: Unix time after which no case starts.
    """
    start = time.time()
    cases: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "results.json").write_text(json.dumps(results))
        task = {"section": section.name, "scale": scale, "until": until, "done": []}
        for _ in range(_MAX_CHILDREN):
            ending = _run_child(child, task, Path(folder))
            is_over = _take_over(cases, Path(folder) / "stream.jsonl")
            if is_over or not _blame(cases, ending) or ending.is_late:
                break
            task["done"] = [name for name, case in cases.items() if case["status"] != "planned"]
    _skip_planned(cases)
    return {"seconds": time.time() - start, "cases": list(cases.values())}


def this_child(script: Path, environment: dict[str, str]) -> Child:
    """The script that is running, by the same Python, as a child."""
    return Child([sys.executable, str(script), "--child"], environment)


def _run_child(child: Child, task: Row, folder: Path) -> Ending:
    stream, log = folder / "stream.jsonl", folder / "log.txt"
    stream.unlink(missing_ok=True)
    files = {"results": str(folder / "results.json"), "stream": str(stream)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*child.command, json.dumps({**task, **files})],
            env=child.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        is_late = _is_late(process, task["until"] + _GRACE_SECONDS - time.time())
    return Ending(is_late, log.read_text()[-4000:])


def _is_late(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Waits; whether the child had to be ended, with what it had started."""
    try:
        process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _take_over(cases: dict[str, Row], stream: Path) -> bool:
    """Takes over what a child wrote; whether it wrote all."""
    lines = stream.read_text().splitlines() if stream.exists() else []
    for line in map(json.loads, lines):
        if line["status"] == "end":
            return True
        known = cases.get(line["name"], {})
        if line["status"] != "planned" or not known:
            cases[line["name"]] = {"seconds": 0.0, "rows": [], **known, **line}
    return False


def _blame(cases: dict[str, Row], ending: Ending) -> bool:
    """Fails the case that a child died of, or its start; whether another child may do better."""
    lines = ending.log.strip().splitlines()
    last_line = lines[-1] if lines else "the process died without a word"
    why = {"reason": "did not end in time" if ending.is_late else last_line, "log": ending.log}
    started = [case for case in cases.values() if case["status"] == "started"]
    for case in started:
        case.update(why, status="unavailable" if case["is_optional"] else "failed")
    if not cases:
        cases["start"] = {"name": "start", "status": "failed", "seconds": 0.0, "rows": [], **why}
        return False
    return True


def _skip_planned(cases: dict[str, Row]) -> None:
    for case in cases.values():
        if case["status"] == "planned":
            case.update(status="skipped", reason="no time left")
