"""Tiny models, a tokenizer of whole words and a few rows of data, as real files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gad_fast.config import Recipe

SPECIALS = ("<pad>", "<bos>", "<user>", "<assistant>", "<end>", "<unk>")
WORDS = ("red", "blue", "green", "one", "two", "three", "sun", "moon", "sea", "sky")
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template; answers end with <end>."""
    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def llama_config(vocab_size: int = len(SPECIALS) + len(WORDS), **overrides: Any) -> LlamaConfig:
    """Two layers of width 16."""
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # peaked distributions, so that wrong maths shows
    }
    return LlamaConfig(**{**values, **overrides})


def save_student(folder: Path, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random student with its tokenizer."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**overrides))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Prompts of two to four words, answered with one to five."""
    return [
        {
            "prompt": " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(2 + i % 3)) + f" {i}",
            "teacher_response": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 5)),
        }
        for i in range(count)
    ]


def values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A small recipe as nested dictionaries, with student and data written into `folder`."""
    if not (folder / "student").exists():
        save_student(folder / "student")
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", rows())
    fast = {"peak": 1e-3}
    base: dict[str, Any] = {
        "name": "tiny",
        "output": folder / "run",
        "student": {"model": str(folder / "student")},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "validation_fraction": 0.2,
            "max_prompt_tokens": 16,
            "max_response_tokens": 6,
        },
        "rollout": {"group_size": 3, "temperature": 0.8},
        "batch": {"prompts_per_step": 4, "tokens_per_micro_batch": 80},
        "warmup": {
            "steps": 3,
            "discriminator_only_steps": 1,
            "student": fast,
            "discriminator": fast,
        },
        "game": {"steps": 3, "student": fast, "discriminator": fast, "kl_coef": 0.1},
        "hardware": {"device": "cpu", "compute_dtype": "float32"},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return base


def recipe(folder: Path, **sections: Any) -> Recipe:
    """A small recipe whose student and data stand in `folder`."""
    return Recipe.from_values(values(folder, **sections))
