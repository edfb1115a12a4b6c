"""Text to packed ids on one core: the Rust core against the installed tokenizers and transformers.

Question: does tokenizing ever hold up a GPU? Texts are new to each tokenizer, as a rollout's are:
in every turn they are drawn anew from the English of Python's own manual, and all sides start with
cold caches. Ids must be equal first. The peers are `tokenizer(texts)` of transformers, which gives
lists, and `encode_batch` of tokenizers; all run on one thread.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from gad_fast import _core
from gad_fast.bench.english import lines, passage
from gad_fast.bench.report import Comparison, Report
from gad_fast.bench.timing import seconds
from gad_fast.errors import ModelError

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
Samples = dict[str, list[dict[str, float]]]


def run(folder: Path, *, quick: bool) -> Report:
    """Encodes with all sides in turns; fails unless their ids agree.

    Raises:
        ModelError: there is no tokenizer in the folder.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"there is no tokenizer.json in {folder} (name a model folder with --model)"
        )
    num_characters, num_calls, repeats = (50_000, 5, 1) if quick else (4_000_000, 200, 5)
    with _one_thread():
        found = measure(folder, num_characters, num_calls, repeats)
    return Report(
        name="tokenizer",
        is_quick=quick,
        question="Does turning text into ids ever hold up a GPU? (one thread, cold caches)",
        settings={
            "tokenizer": folder.resolve().name,
            "num_characters": num_characters,
            "num_calls": num_calls,
            "seed": SEED,
            "num_threads": 1,
        },
        comparisons=[row for case, turns in found.items() for row in _comparisons(case, turns)],
        samples=found,
    )


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


def compare(
    folder: Path, batches_of_turn: Callable[[int], list[Texts]], repeats: int
) -> list[dict[str, float]]:
    """Bytes and seconds of all sides in turns, on new texts in each, with cold caches."""
    turns: list[dict[str, float]] = []
    for turn in range(repeats):
        batches = batches_of_turn(turn)
        size = sum(len(text.encode()) for batch in batches for text in batch)
        taken = {name: _encode_all(side, batches) for name, side in sides(folder).items()}
        turns.append({"bytes": size, **taken})
    return turns


def _encode_all(encode: Encode, batches: list[Texts]) -> float:
    return seconds(lambda: [encode(batch) for batch in batches])


def measure(folder: Path, num_characters: int, num_calls: int, repeats: int) -> Samples:
    """The three comparisons, each on texts that differ from turn to turn."""
    source = lines()
    found: Samples = {}
    for name, draw in (("english", english), ("chats", chats)):
        check_equal(sides(folder), draw(source, random.Random(-1), num_characters // 4))
        found[name] = compare(
            folder,
            lambda turn, draw=draw: [draw(source, random.Random(SEED + turn), num_characters)],
            repeats,
        )
    found["one chat"] = compare(
        folder,
        lambda turn: [
            [chat]
            for chat in chats(source, random.Random(SEED + turn), num_calls * CHAT_CHARACTERS)
        ],
        repeats,
    )
    return found


def _comparisons(case: str, turns: list[dict[str, float]]) -> list[Comparison]:
    rate = statistics.median(turn["bytes"] / turn["ours"] / 1e6 for turn in turns)
    return [
        Comparison(
            case=f"{case}, {rate:.0f} MB/s",
            peer=peer,
            ratios=[turn[peer] / turn["ours"] for turn in turns],
            goal=GOALS[case].get(peer),
        )
        for peer in ("transformers", "tokenizers")
    ]


@contextmanager
def _one_thread() -> Generator[None]:
    """Every library on one thread: each reads its setting at its first batch."""
    before = dict(os.environ)
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name in ONE_THREAD:
            os.environ.pop(name)
        os.environ.update(before)
