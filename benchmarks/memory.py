"""Does `--dry-run` tell how much memory a run will take?

Short runs in a process each: the most memory that a run added to the process, against the
estimate. glibc's malloc is told to give large blocks back, as an allocator of a GPU does; left to
itself it keeps up to as much again of what was freed.

    python benchmarks/memory.py MODEL [--tokens 400 800] [--only CASE ...] [--output FILE.json]
                                [--measured FILE.json]

`--measured` takes the measurements of another result, and makes only the estimates anew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from gad_fast import Recipe
from gad_fast.bench import machine
from gad_fast.run.display import Display
from gad_fast.text import TextCodec
from gad_fast.training import load_inputs, train

ADAPTERS = {"lora": {"rank": 16}}
CASES: dict[str, dict[str, Any]] = {
    "all weights, float32": {},
    "all weights, bfloat16 products": {"hardware": {"compute_dtype": "bfloat16"}},
    "layers recomputed": {"hardware": {"gradient_checkpointing": True}},
    "8-bit moments": {"optimizer": {"name": "adamw_8bit"}},
    "no reference": {"game": {"kl_coef": 0.0}},
    "adapters": ADAPTERS,
    "adapters on bfloat16 weights": ADAPTERS
    | {"student": {"dtype": "bfloat16"}, "hardware": {"compute_dtype": "bfloat16"}},
    "adapters, layers recomputed": ADAPTERS | {"hardware": {"gradient_checkpointing": True}},
}
PROMPT_TOKENS, RESPONSE_TOKENS, GROUP_SIZE = 256, 24, 3


def recipe_of(model: str, case: str, tokens: int, folder: Path) -> Recipe:
    """A short game whose groups are as long as they may be."""
    codec = TextCodec.from_pretrained(model)
    chat: Any = [{"role": "user", "content": "10"}]
    num_words = PROMPT_TOKENS - len(codec.encode_chats([chat], add_generation_prompt=True)[0])
    rows = [
        {"prompt": f"{10 + index}" + " the" * num_words, "teacher_response": " the" * 200}
        for index in range(20)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate = {"peak": 1e-6}
    values: dict[str, Any] = {
        "name": case,
        "output": folder / "run",
        "student": {"model": model},
        "data": {
            "train": str(data),
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_response_tokens": RESPONSE_TOKENS,
            "validation_fraction": 0.5,
            "max_validation_prompts": 1,
        },
        # So hot that no rollout ends before the limit.
        "rollout": {"group_size": GROUP_SIZE, "temperature": 20.0},
        "batch": {"prompts_per_step": 2, "tokens_per_micro_batch": tokens},
        # After warm-up both players have their moments: the first step of the game holds all.
        "warmup": {
            "steps": 1,
            "discriminator_only_steps": 0,
            "student": rate,
            "discriminator": rate,
        },
        "game": {"steps": 1, "student": rate, "discriminator": rate},
        "hardware": {"device": "cpu", "compute_dtype": "float32"},
    }
    for section, settings in CASES[case].items():
        values[section] = {**values.get(section, {}), **settings}
    return Recipe.from_values(values)


def estimate(model: str, case: str, tokens: int) -> dict[str, float]:
    """GiB by what they hold."""
    with tempfile.TemporaryDirectory() as name:
        return load_inputs(recipe_of(model, case, tokens, Path(name))).plan.memory_gib


def measure(model: str, case: str, tokens: int) -> float:
    """GiB that a run adds to this process at its peak."""
    with tempfile.TemporaryDirectory() as name, Path("/dev/null").open("w") as screen:
        recipe = recipe_of(model, case, tokens, Path(name))
        load_inputs(recipe)  # what is loaded once, and what the estimate itself takes
        with peak_of_data() as peak:
            train(recipe, display=Display(Console(file=screen)))
    return peak[0]


@contextlib.contextmanager
def peak_of_data() -> Generator[list[float]]:
    """GiB by which data in the memory of this process grew at most, mapped weights included."""
    before, peak, is_over = data_gib(), [0.0], threading.Event()

    def watch() -> None:
        weights, turns = 0.0, itertools.count()
        while not is_over.wait(0.005):
            if next(turns) % 100 == 0:  # it costs more to look up, and stays for long
                weights = mapped_gib()
            peak[0] = max(peak[0], data_gib() + weights - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        is_over.set()
        watcher.join()


def data_gib() -> float:
    """What this process has written to memory, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20


def mapped_gib() -> float:
    """GiB of weights that are read where their file is mapped: those that training leaves."""
    kib, is_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            is_weights = rest.endswith(".safetensors")
        elif is_weights and key in ("Rss:", "Anonymous:"):
            kib += int(rest.split()[0]) * (1 if key == "Rss:" else -1)
    return kib / 2**20


def measure_in_a_process(model: str, case: str, tokens: int) -> float:
    """`measure`, with large blocks given back."""
    done = subprocess.run(
        [sys.executable, __file__, model, "--child", "--tokens", str(tokens), "--only", case],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line a case; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the student")
    parser.add_argument("--tokens", type=int, nargs="+", default=[400, 800])
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--child", action="store_true", help="measure one case, here")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.model, arguments.only[0], arguments.tokens[0])))
        return
    cases = list(itertools.product(arguments.tokens, arguments.only))
    known = None if arguments.measured is None else json.loads(arguments.measured.read_text())
    results = [compare(arguments.model, case, tokens, known) for tokens, case in cases]
    if arguments.output:
        record = {
            "model": Path(arguments.model).name,
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            **machine.commit(),
            "measured_at": machine.commit()["commit"] if known is None else known["measured_at"],
            "results": results,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def compare(model: str, case: str, tokens: int, known: Any | None) -> dict[str, Any]:
    """A case's line, which is printed too; measured unless a result is known."""
    parts = estimate(model, case, tokens)
    measured = (
        measure_in_a_process(model, case, tokens)
        if known is None
        else next(
            line["measured"]
            for line in known["results"]
            if (line["case"], line["tokens"]) == (case, tokens)
        )
    )
    total = sum(parts.values())
    print(
        f"{case:32} {tokens:5} tokens  estimate {total:.2f} GiB  "
        f"measured {measured:.2f} GiB  ratio {total / measured:.2f}",
        flush=True,
    )
    return {
        "case": case,
        "tokens": tokens,
        "ratio": total / measured,
        "estimate": total,
        "measured": measured,
        "parts": parts,
    }


if __name__ == "__main__":
    main()
