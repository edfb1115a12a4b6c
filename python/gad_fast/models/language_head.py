"""The head of a language model, made one that gives losses without whole logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from gad_fast.kernels import FusedLMHead

# How far, relative to the largest, logits made in two ways may be apart: roundings of the dtype.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What a model does to the product of hidden states and head."""

    logit_scale: float
    softcap: float | None

    def as_keywords(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


def fuse_head(model: PreTrainedModel) -> HeadOptions | None:
    """Gives the model a FusedLMHead with the same parameters; None where its logits are others'.

    Architectures differ in what they do between the last hidden state and the logits. The three
    things known here (Cohere's scale, Granite's divisor, Gemma's cap) are read from the
    configuration, and a probe decides: unless they give the model's own logits, the head is left.
    """
    head = model.get_output_embeddings()
    options = _options(model.config)
    if isinstance(head, FusedLMHead):
        return options
    if type(head) is not torch.nn.Linear or head.weight.dtype not in _TOLERANCE:
        return None
    if not _gives_own_logits(model, options):
        return None
    model.set_output_embeddings(FusedLMHead.from_linear(head))
    return options


def _options(config: Any) -> HeadOptions:
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    divisor = float(getattr(text, "logits_scaling", None) or 1.0)
    return HeadOptions(scale / divisor, getattr(text, "final_logit_softcapping", None))


def _gives_own_logits(model: PreTrainedModel, options: HeadOptions) -> bool:
    embeddings: Any = model.get_input_embeddings()
    num_tokens = min(7, embeddings.num_embeddings)
    ids = torch.arange(num_tokens, device=embeddings.weight.device)[None]
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = options.logit_scale * head(hidden)
    if options.softcap is not None:
        ours = options.softcap * torch.tanh(ours / options.softcap)
    limit = _TOLERANCE[head.weight.dtype] * logits.abs().max()
    return ours.shape == logits.shape and bool((ours - logits).abs().max() <= limit)
