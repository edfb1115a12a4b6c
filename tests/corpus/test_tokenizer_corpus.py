"""Ids of real tokenizers are those of the published `tokenizers` package, and decode to the text.

The tokenizers are no part of the repository: `make corpus` fetches them.
"""

import json
import random
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gad_fast import _core

pytestmark = pytest.mark.corpus

ROOT = Path(__file__).parents[2]
PATHS = {
    "smollm2": ROOT / "models/SmolLM2-135M-Instruct/tokenizer.json",
    "qwen2.5": ROOT / "models/tokenizers/qwen2.5/tokenizer.json",
    "deepseek": ROOT / "models/tokenizers/deepseek/tokenizer.json",
    "gemma3": ROOT / "models/tokenizers/gemma3/tokenizer.json",
}
SEED = 0

WORDS = ["Ångström", "café", "Việt Nam", "हिन्दी", "한국어", "ก็", "שָׁלוֹם", "e\u0301\u0323", "ﬁ ½ Å"]
EDGES = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "a\r\nb\r\n\r\n\tc\rd\n\n\n  e",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 1️⃣ ☎︎☎️",
    "don't I'LL we've 'S it’s",
    "x=1;y==2 /* c */ 0x1F 1,234,567.89 ²³¾ ٣٤٥ 一二三",
    "\x00\x01\x03\x04\x06\x13\x14\x16\x1b\x1d\x7f\x85\u00a0\u2028\u3000\ufeff\ufffd",
    "https://example.org/a?b=c#d user@host.tld C:\\x\\y",
    *(unicodedata.normalize(form, word) for form in ("NFC", "NFD", "NFKC") for word in WORDS),
]
RUNS = [
    text * (200_000 // len(text)) for text in ("a", " ", "\n", "1", "ab", "é", "東", "!", "👩‍👧")
]


@cache
def assigned() -> list[str]:
    """All characters of this Python's version of Unicode, but for private ones and surrogates."""
    characters = map(chr, range(sys.maxunicode + 1))
    return [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    path = PATHS[request.param]
    if not path.exists():
        pytest.skip(f"no {path.relative_to(ROOT)}: make corpus fetches it")
    return path


@pytest.fixture(scope="module")
def ours(path: Path) -> _core.Tokenizer:
    return _core.Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def reference(path: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def added_tokens(path: Path) -> list[str]:
    return [token["content"] for token in json.loads(path.read_text())["added_tokens"]]


def assert_same_ids(
    ours: _core.Tokenizer, reference: tokenizers.Tokenizer, texts: list[str]
) -> None:
    ids, offsets = ours.encode_batch(texts)
    expected = [
        encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)
    ]
    for i, (text, expected_ids) in enumerate(zip(texts, expected, strict=True)):
        found = ids[offsets[i] : offsets[i + 1]].tolist()
        assert found == expected_ids, (text[:200], found[:50], expected_ids[:50])
    decoded = ours.decode_batch(ids, offsets, skip_special_tokens=False)
    assert decoded == reference.decode_batch(expected, skip_special_tokens=False)


def test_edge_cases(ours: _core.Tokenizer, reference: tokenizers.Tokenizer) -> None:
    assert_same_ids(ours, reference, [*EDGES, *(f"{a}{b}" for a in EDGES[2:10] for b in EDGES)])


def test_special_tokens_in_a_text(
    ours: _core.Tokenizer, reference: tokenizers.Tokenizer, path: Path
) -> None:
    specials = added_tokens(path)[:40]
    texts = [f"a{token} b {token}{token}\n{token[:-1]}" for token in specials]
    assert_same_ids(ours, reference, texts)


def test_texts_of_this_repository(ours: _core.Tokenizer, reference: tokenizers.Tokenizer) -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("python/**/*.py")]
    texts = [file.read_text(encoding="utf-8") for file in sorted(files)]
    assert sum(map(len, texts)) > 100_000
    assert_same_ids(ours, reference, texts)


def test_long_runs(ours: _core.Tokenizer, reference: tokenizers.Tokenizer) -> None:
    assert_same_ids(ours, reference, RUNS)


def test_random_text_of_all_planes(ours: _core.Tokenizer, reference: tokenizers.Tokenizer) -> None:
    generator = random.Random(SEED)
    texts = ["".join(generator.choices(assigned(), k=40)) for _ in range(2_000)]
    assert_same_ids(ours, reference, texts)


PARTS = st.sampled_from([" ", "\r\n", "\u0301", "\u200d", "👩", "'s", "the", "一", "<", "|", "7"])


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_random_text(
    ours: _core.Tokenizer, reference: tokenizers.Tokenizer, data: st.DataObject
) -> None:
    character = st.sampled_from(assigned()) | PARTS
    text = st.lists(character, max_size=40).map("".join)
    assert_same_ids(ours, reference, data.draw(st.lists(text, min_size=1, max_size=4)))


def test_ids_decode_to_the_text(ours: _core.Tokenizer, path: Path) -> None:
    if path == PATHS["smollm2"]:
        pytest.skip("its vocabulary lacks bytes that are in some of the texts")
    texts = [unicodedata.normalize("NFC", text) for text in (*EDGES, *RUNS)]
    ids, offsets = ours.encode_batch(texts)
    assert ours.decode_batch(ids, offsets, skip_special_tokens=False) == texts
    assert offsets[-1] == len(ids)
    assert np.all(ids >= 0)


def test_a_stream_gives_the_text_of_the_batch(ours: _core.Tokenizer) -> None:
    text = "".join(EDGES)
    ids, offsets = ours.encode_batch([text])
    stream = ours.decode_stream(skip_special_tokens=True)
    pieces = [*(stream.push(int(id_)) for id_ in ids), stream.finish()]
    assert ["".join(pieces)] == ours.decode_batch(ids, offsets, skip_special_tokens=True)
