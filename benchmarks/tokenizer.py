"""Text to packed ids on one core: the Rust core against the installed tokenizers and transformers.

Question: does tokenizing ever hold up a GPU? Texts are new to each tokenizer, as a rollout's are:
in every turn they are drawn anew from the English of Python's own manual, and all sides start with
cold caches. Ids must be equal first. The peers are `tokenizer(texts)` of transformers, which gives
lists, and `encode_batch` of tokenizers; all run on one thread.

    python benchmarks/tokenizer.py [--smoke] [--output benchmarks/results/tokenizer.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import transformers

from gad_fast import _core

STUDENT = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
SEED = 0
# Read by each library at its first batch.
ONE_THREAD = {
    "GAD_FAST_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TEXT_CHARACTERS = 2_400
CHAT_CHARACTERS = 3_000
GOALS = {
    "english": {"transformers": 35.0, "tokenizers": 30.0},
    "chats": {"transformers": 35.0, "tokenizers": 30.0},
    "one chat": {"tokenizers": 25.0},
}

Texts = list[str]
Encode = Callable[[Texts], Any]


def sentences() -> Texts:
    """The manual of Python, cut at the ends of its lines and sentences."""
    manual = "\n".join(topics[name] for name in sorted(topics))
    return [f"{line}\n" for line in manual.splitlines() if line.strip()]


def english(source: Texts, generator: random.Random, num_characters: int) -> Texts:
    """Texts of about `TEXT_CHARACTERS`, of runs of sentences from random places."""
    return [
        passage(source, generator, TEXT_CHARACTERS)
        for _ in range(max(1, num_characters // TEXT_CHARACTERS))
    ]


def chats(source: Texts, generator: random.Random, num_characters: int) -> Texts:
    """Chats of four turns with the special tokens of ChatML."""
    turn_characters = CHAT_CHARACTERS // 4
    return [
        "".join(
            f"<|im_start|>{role}\n{passage(source, generator, turn_characters)}<|im_end|>\n"
            for role in ("user", "assistant", "user", "assistant")
        )
        for _ in range(max(1, num_characters // CHAT_CHARACTERS))
    ]


def passage(source: Texts, generator: random.Random, num_characters: int) -> str:
    """Sentences in runs of three, until there are enough characters."""
    parts: Texts = []
    while sum(map(len, parts)) < num_characters:
        start = generator.randrange(len(source))
        parts += source[start : start + 3]
    return "".join(parts)[:num_characters]


def sides(folder: Path) -> dict[str, Encode]:
    """All sides, none of which has seen a text."""
    path = str(folder / "tokenizer.json")
    ours = _core.Tokenizer.from_file(path)
    reference = tokenizers.Tokenizer.from_file(path)
    reference.no_truncation()
    reference.no_padding()
    of_transformers = transformers.AutoTokenizer.from_pretrained(folder)

    def by_transformers(texts: Texts) -> Any:
        return of_transformers(texts, add_special_tokens=False)["input_ids"]

    return {
        "ours": ours.encode_batch,
        "transformers": by_transformers,
        "tokenizers": lambda texts: reference.encode_batch(texts, add_special_tokens=False),
    }


def check_equal(encode: dict[str, Encode], texts: Texts) -> int:
    """Fails unless all sides give the same ids; gives their number."""
    ids, offsets = encode["ours"](texts)
    found = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == encode["transformers"](texts)
    assert found == [encoding.ids for encoding in encode["tokenizers"](texts)]
    return len(ids)


def seconds(run: Encode, batches: list[Texts]) -> float:
    """Wall time of one call for each batch."""
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    return time.perf_counter() - start


def compare(
    folder: Path, batches_of_turn: Callable[[int], list[Texts]], repeats: int
) -> dict[str, Any]:
    """Samples of all sides in turns, on new texts in each, and the ratios to ours."""
    turns: list[dict[str, float]] = []
    for turn in range(repeats):
        batches = batches_of_turn(turn)
        size = sum(len(text.encode()) for batch in batches for text in batch)
        taken = {name: seconds(run, batches) for name, run in sides(folder).items()}
        turns.append({"bytes": size, **{f"{name}_seconds": it for name, it in taken.items()}})
    ratios = {
        peer: [turn[f"{peer}_seconds"] / turn["ours_seconds"] for turn in turns]
        for peer in ("transformers", "tokenizers")
    }
    return {
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "ratio_range": {peer: [min(values), max(values)] for peer, values in ratios.items()},
        "megabytes_per_second": statistics.median(
            turn["bytes"] / turn["ours_seconds"] / 1e6 for turn in turns
        ),
        "samples": turns,
    }


def measure(folder: Path, num_characters: int, num_calls: int, repeats: int) -> dict[str, Any]:
    """The three comparisons, each on texts that differ from turn to turn."""
    source = sentences()
    figures: dict[str, Any] = {}
    for name, draw in (("english", english), ("chats", chats)):
        check_equal(sides(folder), draw(source, random.Random(-1), num_characters // 4))
        figures[name] = compare(
            folder,
            lambda turn, draw=draw: [draw(source, random.Random(SEED + turn), num_characters)],
            repeats,
        )
    figures["one chat"] = compare(
        folder,
        lambda turn: [
            [chat]
            for chat in chats(source, random.Random(SEED + turn), num_calls * CHAT_CHARACTERS)
        ],
        repeats,
    )
    return figures


def print_figures(figures: dict[str, Any]) -> None:
    """One line for each comparison and peer."""
    for name, comparison in figures.items():
        print(f"{name}: {comparison['megabytes_per_second']:.0f} MB/s")
        for peer, ratio in comparison["ratio"].items():
            low, high = comparison["ratio_range"][peer]
            goal = GOALS[name].get(peer)
            aim = f", goal x{goal:.0f}" if goal else ""
            print(f"  x{ratio:.1f} of {peer} (x{low:.1f} to x{high:.1f}){aim}")


def main() -> None:
    """Print the ratios; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=STUDENT, help="a model folder")
    parser.add_argument("--megabytes", type=float, default=4.0, help="text of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="50 kB, once")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    num_characters = 50_000 if arguments.smoke else int(arguments.megabytes * 1e6)
    num_calls, repeats = (5, 1) if arguments.smoke else (200, arguments.repeats)
    figures = measure(arguments.tokenizer, num_characters, num_calls, repeats)
    print_figures(figures)
    if arguments.output:
        record = {
            "tokenizer": arguments.tokenizer.name,
            "num_characters": num_characters,
            "seed": SEED,
            "goals": GOALS,
            "processor": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
            **figures,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
