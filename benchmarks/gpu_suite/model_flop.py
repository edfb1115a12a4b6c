"""Operations that training a model takes, counted from its sizes: what its utilisation is made of.

Each token that must be read counts once, that of a shared prompt too, and nothing that is computed
again. Adapters, norms and activations are left out.

Source: Chowdhery et al., PaLM, 2022, appendix B (model FLOPs utilisation).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Read(NamedTuple):
    """What a model reads in a step."""

    tokens: int
    pairs: int
    """Of a token with one that it sees."""
    scored: int
    """Tokens that reach the language head."""


def groups_read(num_groups: int, prompt_tokens: int, responses: tuple[int, int]) -> Read:
    """Groups whose prompts are read once.

    Args:
        num_groups: of a step.
        prompt_tokens: of each.
        responses: of each group, and tokens of each response.
    """
    num_responses, length = responses
    own = length * (length + 1) // 2
    in_prompt = prompt_tokens * (prompt_tokens + 1) // 2
    pairs = in_prompt + num_responses * (prompt_tokens * length + own)
    tokens = prompt_tokens + num_responses * length
    return Read(num_groups * tokens, num_groups * pairs, num_groups * num_responses * length)


def forward_flop(model: Any, read: Read, *, has_head: bool) -> float:
    """Of a pass without gradients."""
    backbone = sum(weight.numel() for weight in _weights(model.base_model))
    head = model.get_output_embeddings().weight.numel() if has_head else 0
    return 2.0 * backbone * read.tokens + 2.0 * head * read.scored + _attention(model, read)


def training_flop(model: Any, read: Read, *, has_head: bool) -> float:
    """Of a forward and backward pass; a frozen weight takes no gradient, but passes one on."""
    forward = forward_flop(model, read, has_head=has_head)
    learned = sum(w.numel() for w in _weights(model.base_model) if w.requires_grad)
    head = model.get_output_embeddings().weight if has_head else None
    head_learned = head.numel() if head is not None and head.requires_grad else 0
    # The backward pass of attention is two products for each of the forward pass.
    passed_on = forward + _attention(model, read)
    return forward + passed_on + 2.0 * (learned * read.tokens + head_learned * read.scored)


def _weights(backbone: nn.Module) -> Iterator[Tensor]:
    """Those of the linear layers, without adapters."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            yield module.weight


def _attention(model: Any, read: Read) -> float:
    """Queries by keys, and weights by values."""
    config = model.config.get_text_config()
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    return 4.0 * read.pairs * width * config.num_hidden_layers
