"""Weights go into a Hugging Face folder and back into a model bit for bit, whatever its kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tiny
from gad_fast.errors import ModelError
from gad_fast.models.language_head import fuse_head
from gad_fast.models.saving import copy_for_saving, load_weights


def llama(**overrides: Any) -> PreTrainedModel:
    return LlamaForCausalLM(tiny.llama_config(**overrides))


def fused() -> PreTrainedModel:
    model = llama(tie_word_embeddings=True)
    assert fuse_head(model) is not None
    return model


def experts() -> PreTrainedModel:
    """Kept under other names than it is saved under."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
    counts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **counts, **heads}))


def mixed() -> PreTrainedModel:
    """A backbone in bfloat16 under a head in float32, as a discriminator has."""
    model: Any = LlamaForSequenceClassification(tiny.llama_config(num_labels=1))
    model.bfloat16()
    model.score.float()
    return model


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tie_word_embeddings=True), fused, experts, mixed]
)
def test_weights_come_back_bit_for_bit(tmp_path: Path, make: Any) -> None:
    """The copy is that of the moment it was taken, though the model trains on."""
    torch.manual_seed(0)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_later = copy_for_saving(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    write_later(tmp_path)
    torch.manual_seed(1)
    other = make()
    load_weights(other, tmp_path)
    after = other.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def test_a_saved_folder_is_one_of_hugging_face(tmp_path: Path) -> None:
    model = fused()
    copy_for_saving(model)(tmp_path)
    ids = torch.tensor([[1, 2, 7, 9]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, llama_logits(model, ids))


def llama_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    plain = llama(tie_word_embeddings=True)
    plain.load_state_dict(model.state_dict())
    return plain(ids).logits


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    copy_for_saving(llama())(tmp_path)
    with pytest.raises((ModelError, RuntimeError)):
        load_weights(llama(hidden_size=32), tmp_path)
    with pytest.raises(ModelError, match="does not hold the weights of a LlamaForCausalLM"):
        load_weights(llama(num_hidden_layers=1), tmp_path)
