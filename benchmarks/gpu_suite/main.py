"""The command: sections in order, the results after each, and the table last."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from gpu_suite.bundle import environment_with
from gpu_suite.cases import Results, rows_of
from gpu_suite.report import failures, print_report, say
from gpu_suite.supervisor import Child, Section, run_section, this_child

ROOT = Path(__file__).parents[2]
# What a section leaves unused, the next ones have; the last ends within 9 minutes, grace included.
SECTIONS = (
    Section("environment", 45),
    Section("ceilings", 80),
    Section("correctness", 185),
    Section("sanitizer", 240),
    Section("kernels", 325),
    Section("peers", 375),
    Section("step", 430),
    Section("rollouts", 520),
)


def main() -> int:
    """Runs the suite; 1 if anything failed."""
    if sys.argv[1:2] == ["--child"]:
        return _work(sys.argv[2])
    arguments = _parser().parse_args()
    scale = "smoke" if arguments.smoke else "full"
    wanted = arguments.only or [section.name for section in SECTIONS]
    with tempfile.TemporaryDirectory() as site:
        environment = environment_with(arguments.bundle, Path(site))
        child = this_child(Path(sys.argv[0]).resolve(), environment)
        results, path = _run(wanted, scale, child, arguments.output)
    print_report(results, path)
    return 1 if failures(results) else 0


def _work(task: str) -> int:
    # Only children import torch: a parent that holds a device would take memory from them.
    from gpu_suite.worker import Task, work

    return work(Task(**json.loads(task)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU; times are void")
    parser.add_argument("--output", type=Path, help="JSON file [benchmarks/results/gpu-...]")
    parser.add_argument("--bundle", type=Path, default=ROOT / ".gpu-bundle", help="wheels")
    parser.add_argument(
        "--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION"
    )
    return parser


def _run(wanted: list[str], scale: str, child: Child, output: Path | None) -> tuple[Results, Path]:
    start = time.time()
    started = datetime.datetime.now(datetime.UTC)
    results: Results = {
        "scale": scale,
        "started": started.isoformat(timespec="seconds"),
        "sections": {},
    }
    path = output or ROOT / "benchmarks" / "results" / "gpu-unfinished.json"
    for section in SECTIONS:
        if section.name not in wanted:
            continue
        until = start + section.ends_at_seconds
        found = run_section(section, scale, results, child, until=until)
        results["sections"][section.name] = found
        results["seconds"] = time.time() - start
        _write(results, path)
        say(section.name, found)
    return results, path if output else _named(results, path, started)


def _write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _named(results: Results, path: Path, started: datetime.datetime) -> Path:
    """The file, now that it is known what it is about."""
    names = [row["name"] for row in rows_of(results, "environment") if "name" in row]
    device = re.sub(r"[^a-z0-9]+", "-", (names or ["unknown"])[0].lower()).strip("-")
    kind = "smoke" if results["scale"] == "smoke" else "gpu"
    return path.rename(path.with_name(f"{kind}-{device}-{started:%Y%m%d-%H%M}.json"))
