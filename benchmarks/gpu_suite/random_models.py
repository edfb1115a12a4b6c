"""Qwen2 models of random weights, and what they read: random ids, with a codec that has an end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from gad_fast.models.loading import Precision
from gad_fast.records import EncodedExample, Example, Response
from gad_fast.text import TextCodec

_END_ID = 1
_TEMPLATE = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"


def random_model(
    kind: Any, shape: dict[str, Any], precision: Precision, max_tokens: int, **options: Any
) -> Any:
    """A model on the device, in torch's default dtype.

    Args:
        kind: Qwen2ForCausalLM or Qwen2ForSequenceClassification.
        shape: sizes of its configuration.
        precision: has the device.
        max_tokens: the longest sequence it reads.
        options: what else its configuration says.
    """
    config = Qwen2Config(
        **shape,
        max_position_embeddings=max_tokens,
        bos_token_id=0,
        eos_token_id=_END_ID,
        pad_token_id=0,
        **options,
    )
    with torch.device(precision.device):
        return kind(config).eval()


def random_examples(
    shape: dict[str, Any], num_prompts: int, *, prompt_tokens: int, response_tokens: int
) -> list[EncodedExample]:
    """Prompts, each with a teacher's response, of the same ids in every call."""
    generator = np.random.default_rng(0)

    def ids(num_tokens: int) -> Any:
        # From 2: neither padding nor an end.
        return generator.integers(2, shape["vocab_size"], num_tokens).astype(np.int32)

    example = Example([{"role": "user", "content": ""}], "")
    return [
        EncodedExample(
            example, ids(prompt_tokens), Response(ids(response_tokens), is_finished=False)
        )
        for _ in range(num_prompts)
    ]


def codec_of_two_tokens() -> TextCodec:
    """Two tokens: only the end's id is asked for, since prompts are made as ids."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": _END_ID}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<pad>",
        chat_template=_TEMPLATE,
    )
    return TextCodec(tokenizer, source="the GPU suite")
