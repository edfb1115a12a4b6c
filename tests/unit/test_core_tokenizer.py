"""The tokenizer of the core gives the ids of the published `tokenizers` package."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gad_fast import _core

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "Ein schöner Tag: Äpfel, Öl und Übermut für 3,50 €.",
    "def add(a, b):\n    return a + b\n",
    "東京の天気は晴れ。 Привет, мир! 안녕하세요",
]
END = "<|end|>"
TOOL = "<|tool|>"

TEXTS = [
    "",
    " ",
    "the quick brown fox",
    f"one{END}two{END}{END}",
    f"{TOOL} {END}\n",
    "<|end |> and <|en",
    unicodedata.normalize("NFC", "Ångström café Việt"),
    unicodedata.normalize("NFD", "Ångström café Việt"),
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "a\r\nb\r\n\r\nc\td  \u00a0 e\u3000f",
    "\x00\x03\x04\x04\x06\x1b \x13\x7f",
    "a\U00041234\U00082345b 𝠀\U0010ffff",
    "a" * 5000,
    " " * 5000,
    "1234567890" * 300,
    "don't I'LL we've",
]


# The stand-ins of the bytes which no token of SmolLM2 covers: 04 06 13 14 16 1D F1 F2.
LACKING = set("\u0104\u0106\u0113\u0114\u0116\u011dñò")


def byte_level(folder: Path, *, lacking: set[str], unknown: str | None = None) -> Path:
    """A byte-level BPE trained on the sentences, with tokens for all bytes but those lacking."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - lacking)
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=alphabet,
            special_tokens=[END],
            show_progress=False,
        ),
    )
    # Added after the training: no token of the model.
    tokenizer.add_special_tokens([TOOL])
    return saved(tokenizer, folder)


def words(folder: Path) -> Path:
    vocab = {"[UNK]": 0, "the": 1, "quick": 2, "fox": 3, "café": 4, END: 5}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END])
    return saved(tokenizer, folder)


def pieces(folder: Path) -> Path:
    """A Unigram in the manner of SentencePiece."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=150, unk_token="<unk>", special_tokens=["<unk>", END], show_progress=False
        ),
    )
    return saved(tokenizer, folder)


def word_pieces(folder: Path) -> Path:
    """In the manner of BERT: lower case, no accents, words in pieces."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(
            vocab_size=150, special_tokens=["[UNK]", END], show_progress=False
        ),
    )
    return saved(tokenizer, folder)


def saved(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


TOKENIZERS = {
    "byte_level": lambda folder: byte_level(folder, lacking=set()),
    "byte_level_lacking_bytes": lambda folder: byte_level(folder, lacking=LACKING),
    "byte_level_lacking_bytes_with_unknown": lambda folder: byte_level(
        folder, lacking=LACKING, unknown=END
    ),
    "word_level": words,
    "unigram": pieces,
    "word_piece": word_pieces,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def full_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("full"), lacking=set())


def reference_ids(path: Path, texts: list[str]) -> list[list[int]]:
    reference = tokenizers.Tokenizer.from_file(str(path))
    return [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]


def unpack(ids: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


def test_ids_are_those_of_the_tokenizers_package(path: Path) -> None:
    ids, offsets = _core.Tokenizer.from_file(str(path)).encode_batch(TEXTS)
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(ids), len(TEXTS) + 1)
    assert unpack(ids, offsets) == reference_ids(path, TEXTS)


# Up to U+07FF and assigned: there the Unicode tables of the two versions agree.
CHARACTERS = st.characters(max_codepoint=0x7FF, exclude_categories=["Cn"])
PARTS = st.sampled_from([END, TOOL, " the", "\r\n", "👩‍👩‍👧", "東京"])


@given(st.lists(st.lists(CHARACTERS | PARTS, max_size=40).map("".join), min_size=1, max_size=8))
@settings(deadline=None)
def test_ids_of_random_texts_are_those_of_the_tokenizers_package(
    full_path: Path, texts: list[str]
) -> None:
    ids, offsets = _core.Tokenizer.from_file(str(full_path)).encode_batch(texts)
    assert unpack(ids, offsets) == reference_ids(full_path, texts)


def test_a_batch_large_enough_for_threads_has_the_same_ids(path: Path) -> None:
    texts = [(sentence + END) * (index % 17) for index, sentence in enumerate(SENTENCES * 150)]
    assert sum(map(len, texts)) > 200_000
    ids, offsets = _core.Tokenizer.from_file(str(path)).encode_batch(texts)
    assert unpack(ids, offsets) == reference_ids(path, texts)


def test_decoding_is_that_of_the_tokenizers_package(path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(path))
    reference = tokenizers.Tokenizer.from_file(str(path))
    ids, offsets = tokenizer.encode_batch(TEXTS)
    for skip in (False, True):
        texts = tokenizer.decode_batch(ids, offsets, skip_special_tokens=skip)
        assert texts == reference.decode_batch(unpack(ids, offsets), skip_special_tokens=skip)


def test_decoding_gives_back_the_text(full_path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, offsets = tokenizer.encode_batch(TEXTS)
    assert tokenizer.decode_batch(ids, offsets, skip_special_tokens=False) == TEXTS


def test_special_tokens_are_skipped_on_demand(full_path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, offsets = tokenizer.encode_batch([f"one{END}two{TOOL}"])
    assert tokenizer.decode_batch(ids, offsets, skip_special_tokens=True) == ["onetwo"]


def test_a_response_cut_within_a_character_ends_in_the_replacement_character(
    full_path: Path,
) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, _ = tokenizer.encode_batch(["a🏳"])
    texts = tokenizer.decode_batch(ids[:-1], np.array([0, len(ids) - 1]), skip_special_tokens=False)
    assert texts == ["a�"]


def test_arrays_with_a_stride_are_read_right(full_path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, offsets = tokenizer.encode_batch(TEXTS)
    texts = tokenizer.decode_batch(
        np.repeat(ids, 2)[::2], np.repeat(offsets, 3)[::3], skip_special_tokens=False
    )
    assert texts == TEXTS


def test_the_vocabulary_is_that_of_the_tokenizers_package(path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(path))
    vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    assert tokenizer.vocab_size == len(vocab)
    assert {token: tokenizer.token_to_id(token) for token in vocab} == vocab
    assert tokenizer.token_to_id("no such token") is None


def test_an_empty_batch_has_one_offset(full_path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, offsets = tokenizer.encode_batch([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])
    assert tokenizer.decode_batch(ids, offsets, skip_special_tokens=True) == []


def test_the_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    reference = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path, lacking=set())))
    expected = reference.encode(SENTENCES[0], add_special_tokens=False).ids
    reference.enable_truncation(3)
    reference.enable_padding(length=100)
    ids, offsets = _core.Tokenizer.from_file(str(saved(reference, tmp_path))).encode_batch(
        [SENTENCES[0]]
    )
    assert unpack(ids, offsets) == [expected]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot read the tokenizer file .*missing\.json"):
        _core.Tokenizer.from_file(str(tmp_path / "missing.json"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "Sorcery"}}', "\x00\xff"])
def test_a_file_of_something_else_is_a_tokenizer_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(_core.TokenizerError, match="not a usable tokenizer"):
        _core.Tokenizer.from_file(str(path))


def test_a_lone_surrogate_is_a_tokenizer_error_that_names_the_text(full_path: Path) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    with pytest.raises(_core.TokenizerError, match="text 1 holds a lone surrogate"):
        tokenizer.encode_batch(["fine", "broken \ud83d"])


@pytest.mark.parametrize("texts", ["one text", ["one", 2], [b"one"], None])
def test_texts_that_are_no_sequence_of_str_are_a_type_error(full_path: Path, texts: object) -> None:
    with pytest.raises(TypeError):
        _core.Tokenizer.from_file(str(full_path)).encode_batch(texts)  # pyright: ignore


@pytest.mark.parametrize("padding_id", [10_000, 2**31 - 1])
def test_ids_beyond_the_vocabulary_are_passed_over(full_path: Path, padding_id: int) -> None:
    tokenizer = _core.Tokenizer.from_file(str(full_path))
    ids, offsets = tokenizer.encode_batch(["the cat"])
    padded = np.append(ids, np.int32(padding_id)).astype(np.int32)
    texts = tokenizer.decode_batch(padded, offsets + np.array([0, 1]), skip_special_tokens=False)
    assert texts == tokenizer.decode_batch(ids, offsets, skip_special_tokens=False)


@pytest.mark.parametrize("wrong_id", [-1, -(2**31)])
def test_a_negative_id_is_a_value_error(full_path: Path, wrong_id: int) -> None:
    ids = np.array([1, 2, wrong_id], dtype=np.int32)
    with pytest.raises(ValueError, match=f"at least 0, got {wrong_id} at position 2"):
        _core.Tokenizer.from_file(str(full_path)).decode_batch(
            ids, np.array([0, 3]), skip_special_tokens=False
        )


@pytest.mark.parametrize("offsets", [[], [0], [1, 3], [-1, 3], [0, 2, 1, 3], [0, 2], [0, 4]])
def test_offsets_that_do_not_cut_the_ids_are_a_value_error(
    full_path: Path, offsets: list[int]
) -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    with pytest.raises(ValueError, match="offsets"):
        _core.Tokenizer.from_file(str(full_path)).decode_batch(
            ids, np.array(offsets, dtype=np.int64), skip_special_tokens=False
        )


def test_a_number_of_threads_that_is_none_is_a_value_error(
    full_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAD_FAST_NUM_THREADS", "0")
    with pytest.raises(ValueError, match="GAD_FAST_NUM_THREADS must be a whole number"):
        _core.Tokenizer.from_file(str(full_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is of POSIX")
def test_a_forked_process_can_encode(full_path: Path) -> None:
    # In a process of its own: this one may have threads of other libraries, which a fork loses.
    script = """
import os, sys
from gad_fast import _core
tokenizer = _core.Tokenizer.from_file(sys.argv[1])
texts = ["the quick brown fox"] * 20_000
expected = tokenizer.encode_batch(texts)[0].tolist()
child = os.fork()
if child == 0:
    os._exit(tokenizer.encode_batch(texts)[0].tolist() != expected)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"GAD_FAST_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(full_path)],
        check=False,
        timeout=20,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no signal reaches another process there")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_ctrl_c_ends_a_long_batch(full_path: Path, num_threads: int) -> None:
    # The timer stands for the key: it sends SIGINT to this process in the midst of the batch.
    script = """
import signal, sys, time
from gad_fast import _core
tokenizer = _core.Tokenizer.from_file(sys.argv[1])
texts = ["The quick brown fox, and the dog doesn't mind. " * 20_000] * 500
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    tokenizer.encode_batch(texts)
except KeyboardInterrupt:
    print("interrupted")
assert len(tokenizer.encode_batch(texts[:1])[1]) == 2
"""
    environment = os.environ | {"GAD_FAST_NUM_THREADS": str(num_threads)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(full_path)],
        check=True,
        timeout=20,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "interrupted\n"
