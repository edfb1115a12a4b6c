"""The language of examples/gad_in_200_lines.py as files: tokenizer, models and teacher rows."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import gad_in_200_lines as pairs
import tiny

SPECIALS = {"<begin>": pairs.BEGIN, "<end>": pairs.END, "<pad>": pairs.PAD}
TEMPLATE = "<begin>{% for m in messages if m.role == 'assistant' %}{{ m.content }}<end>{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; every prompt is just <begin>."""
    words = {f"w{index}": index for index in range(pairs.OPENINGS, pairs.VOCABULARY)}
    backend = Tokenizer(models.WordLevel({**SPECIALS, **words}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


def write_teacher(path: Path, count: int, seed: int) -> None:
    """Writes `count` teacher sentences as rows."""
    sentences = pairs.teacher_sentences(count, torch.Generator().manual_seed(seed))
    texts = (" ".join(f"w{word}" for word in s) for s in sentences[:, :-1].tolist())
    tiny.write_rows(path, [{"prompt": "go", "teacher_response": text} for text in texts])


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model, with the tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
