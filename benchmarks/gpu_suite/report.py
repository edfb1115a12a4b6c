"""What the suite has found, as short tables: the whole of it stands in the JSON file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpu_suite.cases import Results, Row, rows_of

# Wide enough for a kernel's line where the output is no terminal.
_WIDTH = 118
_CONSOLE = Console(width=_WIDTH, highlight=False)


def say(section: str, found: Row) -> None:
    """One line as soon as a section has ended."""
    counts: dict[str, int] = {}
    for case in found["cases"]:
        counts[case["status"]] = counts.get(case["status"], 0) + 1
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    _CONSOLE.print(f"{section}: {summary or 'nothing'} ({found['seconds']:.0f} s)")


def failures(results: Results) -> list[tuple[str, Row]]:
    """Sections and cases that failed."""
    return _cases_with(results, "failed")


def print_report(results: Results, path: Path) -> None:
    """Tables, then what failed, what found no time, and where the rest is."""
    for table in (
        _environment(results),
        _ceilings(results),
        _correctness(results),
        _kernels(results),
        _small_operations(results),
        _step(results),
        _rollouts(results),
    ):
        if table.row_count:
            _CONSOLE.print(table)
    _print_cases(results)
    is_smoke = results["scale"] == "smoke"
    _CONSOLE.print(f"{'smoke run, times are void: ' if is_smoke else ''}{path}", soft_wrap=True)


def _environment(results: Results) -> Table:
    table = _table("environment", "what", "found")
    for row in rows_of(results, "environment"):
        for key, value in row.items():
            table.add_row(key, str(value))
    for row in rows_of(results, "sanitizer"):
        if row["tool"]:
            table.add_row(row["tool"], row["state"])
    return table


def _ceilings(results: Results) -> Table:
    table = _table("ceilings", "what", "GB/s", "TFLOP/s")
    for row in rows_of(results, "ceilings"):
        rates = (row.get("gb_per_second"), row.get("tflop_per_second"))
        table.add_row(row["what"], *(_number(rate, ".0f") for rate in rates))
    return table


def _correctness(results: Results) -> Table:
    """Per operation and quantity, the shape that comes closest to its limit."""
    table = _table("correctness", "operation", "quantity", "worst", "limit", "at", "checks")
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows_of(results, "correctness"):
        groups.setdefault((row["op"], row["quantity"], row["limit"]), []).append(row)
    for (op, quantity, limit), rows in groups.items():
        worst = max(rows, key=lambda row: (row["error"] != row["error"], row["error"]))
        where = " ".join(filter(None, [worst.get("shape"), worst.get("dtype")]))
        style = None if all(row["passes"] for row in rows) else "bold red"
        table.add_row(
            op, quantity, f"{worst['error']:.1e}", f"{limit:.0e}", where, str(len(rows)),
            style=style,
        )  # fmt: skip
    return table


def _kernels(results: Results) -> Table:
    table = _table(
        "kernels: time over floor",
        "operation", "shape", "ms", "floor", "ratio", "goal", "cuBLAS", "GiB", "peers (x ours)",
    )  # fmt: skip
    peers = rows_of(results, "peers")
    for row in rows_of(results, "kernels"):
        if "floor_ms" not in row:
            continue
        peak = row["peak_gib"]
        extra = None if peak is None else max(0.0, peak - row["gradients_gib"])
        style = "yellow" if row["meets_goal"] is False else None
        table.add_row(
            f"{row['op']} {row['part']}{' frozen' if row['is_frozen'] else ''}",
            row["shape"],
            _number(row["ms"], ".2f"),
            _number(row["floor_ms"], ".2f"),
            _number(row["ratio"], ".2f"),
            _number(row["goal"], ".2f"),
            _number(row["products_ms"], ".2f"),
            _number(extra, ".2f"),
            _against(row, peers),
            style=style,
        )
    return table


def _against(row: Row, peers: list[Row]) -> str:
    """How many times as long each peer took for the same."""
    keys = ("op", "part", "is_frozen", "shape")
    same = [peer for peer in peers if all(peer[key] == row[key] for key in keys)]
    same.sort(key=lambda peer: peer["ms"])
    return ", ".join(f"{peer['by']} {peer['ms'] / row['ms']:.1f}" for peer in same)


def _small_operations(results: Results) -> Table:
    table = _table("small operations", "operation", "by", "ms")
    for row in rows_of(results, "kernels"):
        if "by" in row:
            table.add_row(f"{row['op']} {row['part']}", row["by"], _number(row["ms"], ".3f"))
    return table


def _step(results: Results) -> Table:
    table = _table("one step", "model", "phase", "seconds", "tokens/s", "MFU", "GiB")
    for row in rows_of(results, "step"):
        table.add_row(
            row["model"],
            row["phase"],
            _number(row["seconds"], ".2f"),
            _number(row["tokens_per_second"], ".0f"),
            _number(row["mfu"], ".1%"),
            _number(row["peak_gib"], ".1f"),
        )
    return table


def _rollouts(results: Results) -> Table:
    table = _table(
        "rollouts", "model", "engine", "tokens/s", "x generate", "decode ms", "floor", "ratio"
    )
    rows = rows_of(results, "rollouts")
    generate = {r["model"]: r["tokens_per_second"] for r in rows if r["engine"] == "reference"}
    for row in rows:
        peer = generate.get(row["model"])
        table.add_row(
            row["model"],
            row["engine"],
            _number(row["tokens_per_second"], ".0f"),
            _number(None if peer is None else row["tokens_per_second"] / peer, ".2f"),
            *(_number(row[key], ".2f") for key in ("decode_ms", "floor_ms", "ratio")),
        )
    return table


def _print_cases(results: Results) -> None:
    """What failed in red, and in one line a section what found no time, fits not or is missing."""
    for section, case in failures(results):
        reason = case.get("reason") or "over its limit"
        _CONSOLE.print(
            f"FAILED {section}: {case['name']}: {reason}", style="bold red", markup=False
        )
    for status in ("skipped", "unavailable"):
        for section, case in _cases_with(results, status)[:12]:
            line = f"{status} {section}: {case['name']}: {case['reason']}"
            _CONSOLE.print(line[:_WIDTH], style="dim", markup=False)


def _cases_with(results: Results, status: str) -> list[tuple[str, Row]]:
    return [
        (name, case)
        for name, section in results["sections"].items()
        for case in section["cases"]
        if case["status"] == status
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
