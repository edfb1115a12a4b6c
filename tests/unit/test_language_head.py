"""The fused head of a student gives what the model's own logits give, or is not put in."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen2Config,
)

import tiny
from gad_fast.config import HardwareSettings
from gad_fast.kernels import FusedLMHead
from gad_fast.models.batch import Item, PaddedBatch, pad
from gad_fast.models.language_head import HeadOptions, fuse_head
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student
from gad_fast.records import Response

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
CONFIGS = {
    "llama": (tiny.llama_config(), HeadOptions(1.0, None)),
    "qwen2, tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), HeadOptions(1.0, None)),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=3.0), HeadOptions(1.0, 3.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), HeadOptions(0.25, None)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), HeadOptions(0.25, None)),
    "gpt2": (
        GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        HeadOptions(1.0, None),
    ),
}
PRECISION = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0]).double().eval()


def batch() -> PaddedBatch:
    """Three sequences of different prompts and responses."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 16, size=n).astype(np.int32) for n in (3, 5, 4, 2, 6, 1)]
    items = [
        Item(prompt, [Response(ids, True)]) for prompt, ids in zip(rows[:3], rows[3:], strict=True)
    ]
    return pad(items, pad_id=0, device=torch.device("cpu"))


def losses(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the responses, and the gradients of a loss on them."""
    logprobs = student.response_logprobs(batch(), temperature=0.7)
    advantages = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
    loss, _ = student.policy_loss(
        batch(), advantages, temperature=0.7, ref_logp=logprobs.detach() - 0.3, kl_coef=0.2
    )
    grads = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
    return logprobs.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_head_gives_what_the_models_own_logits_give(name):
    plain = Student(model_of(name), PRECISION)
    assert plain.head_options == CONFIGS[name][1]
    assert isinstance(plain.model.get_output_embeddings(), FusedLMHead)
    own_logits = Student(model_of(name), PRECISION)
    own_logits.head_options = None
    for fused, expected in zip(losses(plain), losses(own_logits), strict=True):
        assert_close(fused, expected, rtol=1e-9, atol=1e-11)


def test_a_model_that_does_more_to_its_logits_keeps_its_own_head(monkeypatch):
    model = model_of("cohere")
    monkeypatch.setattr(model, "logit_scale", 0.5)  # not what its configuration says
    head = model.get_output_embeddings()
    assert fuse_head(model) is None
    assert model.get_output_embeddings() is head
    student = Student(model, PRECISION)
    logits = model(input_ids=batch().input_ids, attention_mask=batch().attention_mask).logits
    assert logits.isfinite().all()
    assert losses(student)[0].shape == (9,)


def test_fused_head_keeps_names_ties_and_generation():
    plain, fused = model_of("qwen2, tied"), model_of("qwen2, tied")
    fuse_head(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert fused.get_output_embeddings().weight is fused.get_input_embeddings().weight
    ids = torch.tensor([[1, 7, 9]])
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fused.generate(ids, **settings), plain.generate(ids, **settings))


def test_frozen_copy_has_a_fused_head_too():
    student = Student(model_of("gemma2"), PRECISION)
    reference = student.frozen_copy()
    assert reference.head_options == student.head_options
    assert_close(
        reference.response_logprobs(batch(), temperature=1.0),
        student.response_logprobs(batch(), temperature=1.0).detach(),
        rtol=0,
        atol=0,
    )
    assert copy.deepcopy(student).head_options == student.head_options
