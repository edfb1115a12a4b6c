"""A prompt that is read once for its whole group gives what a row for each response gives."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.mistral.modeling_mistral import MistralAttention

from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError
from gad_fast.models.batch import Item, pad, share_prompts
from gad_fast.models.loading import Precision
from gad_fast.models.micro_batches import plan
from gad_fast.models.shared_prompts import can_share_prompts
from gad_fast.models.student import Student
from gad_fast.records import Response
from kernel_cases import relative_error

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=64),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=64),
    "mistral": MistralConfig(**SIZES, sliding_window=64),
    "gemma2, narrow": Gemma2Config(**SIZES, sliding_window=5),
    "gemma3, narrow": Gemma3TextConfig(
        **SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral, narrow": MistralConfig(**SIZES, sliding_window=3),
    "qwen2, narrow": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "gpt2": GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
CPU = torch.device("cpu")
PRECISION = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def items() -> list[Item]:
    """Groups of four, one and two responses, some of one token."""
    random = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return random.integers(1, 31, size=length).astype(np.int32)

    lengths = {5: (4, 1, 6, 2), 1: (3,), 8: (1, 9)}
    return [
        Item(ids(prompt), [Response(ids(n), is_finished=True) for n in responses])
        for prompt, responses in lengths.items()
    ]


def layouts(items: list[Item]) -> tuple[Any, Any]:
    return share_prompts(items, device=CPU), pad(items, pad_id=0, device=CPU)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_separate_rows(name):
    model = model_of(CONFIGS[name])
    assert can_share_prompts(model, max_tokens=20)
    shared, padded = layouts(items())
    assert torch.equal(shared.labels, padded.labels)
    assert torch.equal(shared.lengths, padded.lengths)
    with torch.no_grad():
        logits = [
            batch.predictors(model(**batch.model_inputs).logits) for batch in (shared, padded)
        ]
        last = [batch.last_tokens(model(**batch.model_inputs).logits) for batch in (shared, padded)]
    assert_close(*logits, rtol=1e-9, atol=1e-10)
    assert_close(*last, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3, narrow"])
def test_loss_and_gradients_depend_neither_on_the_layout_nor_on_the_budget(name):
    def step(shares_prompts: bool, token_budget: int) -> tuple[list[float], torch.Tensor]:
        student = Student(model_of(CONFIGS[name]), PRECISION, max_tokens=20)
        assert student.shares_prompts
        student.shares_prompts = shares_prompts
        total, seen = 0.0, []
        for indices, batch in student.micro_batches(items(), token_budget=token_budget):
            advantages = torch.tensor([0.3, -1.0, 0.7, 0.2, 1.1, -0.4, 0.9]).double()[indices]
            loss, _ = student.policy_loss(
                batch,
                advantages.repeat_interleave(batch.lengths),
                temperature=0.8,
                entropy_coef=0.01,
                num_tokens=26,
            )
            loss.backward()
            total += loss.item()
            seen += indices
        assert sorted(seen) == list(range(7))
        grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        return [total], torch.cat(grads)

    expected = step(False, 10_000)
    for shares_prompts in (True, False):
        for token_budget in (18, 40, 10_000):
            actual = step(shares_prompts, token_budget)
            assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
            # The norms of these models compute in float32, whatever their weights are.
            assert relative_error(actual[1], expected[1]) < 1e-5


def test_shared_prompts_take_each_token_once_and_no_padding():
    shared, padded = layouts(items())
    assert shared.input_ids.shape == (1, (5 + 4 + 1 + 6 + 2) + (1 + 3) + (8 + 1 + 9))
    assert padded.input_ids.shape == (7, 8 + 9)


def test_no_response_sees_another_one_or_another_group():
    model = model_of(CONFIGS["llama"])
    assert can_share_prompts(model, max_tokens=20)
    batch = share_prompts(items(), device=CPU)
    embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    inputs = {**batch.model_inputs, "inputs_embeds": embeddings}
    del inputs["input_ids"]
    hidden = model.base_model(**inputs).last_hidden_state
    for last, length, prompt in zip(
        batch.last_index.tolist(), [4, 1, 6, 2, 3, 1, 9], [5, 5, 5, 5, 1, 8, 8], strict=True
    ):
        (gradient,) = torch.autograd.grad(hidden[0, last].sum(), embeddings, retain_graph=True)
        seen = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
        start = {5: 0, 1: 18, 8: 22}[prompt]
        own = list(range(last - length + 1, last + 1))
        assert seen == sorted({*range(start, start + prompt), *own})


def test_a_saved_model_does_not_name_the_attention_that_it_was_trained_with(tmp_path):
    model = model_of(CONFIGS["llama"])
    assert can_share_prompts(model, max_tokens=20)
    model.save_pretrained(tmp_path)
    assert "gad_fast" not in (tmp_path / "config.json").read_text()


def test_a_window_that_a_layer_does_not_ask_for_keeps_separate_rows(monkeypatch):
    model = model_of(MistralConfig(**SIZES, sliding_window=8))
    assert can_share_prompts(model, max_tokens=9)
    forward = MistralAttention.forward

    def windowless(self, *arguments: Any, **options: Any) -> Any:
        self.config, own = copy.copy(self.config), self.config
        self.config.sliding_window = None
        try:
            return forward(self, *arguments, **options)
        finally:
            self.config = own

    monkeypatch.setattr(MistralAttention, "forward", windowless)
    assert can_share_prompts(model, max_tokens=8)
    assert not can_share_prompts(model, max_tokens=9)
    assert not can_share_prompts(model, max_tokens=None)


def test_attention_in_chunks_keeps_separate_rows():
    model = model_of(LlamaConfig.from_dict({**SIZES, "attention_chunk_size": 8}))
    assert can_share_prompts(model, max_tokens=8)
    assert not can_share_prompts(model, max_tokens=9)


def test_layers_that_keep_a_state_keep_separate_rows():
    config = MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share_prompts(model, max_tokens=20)


def test_eager_attention_that_adds_its_mask_keeps_separate_rows_or_is_right():
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "eager"
    model = model_of(config)
    if can_share_prompts(model, max_tokens=20):
        shared, padded = layouts(items())
        with torch.no_grad():
            logits = [b.predictors(model(**b.model_inputs).logits) for b in (shared, padded)]
        assert_close(*logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("is_shared", "tokens"), [(True, 18), (False, 44)])
def test_a_group_over_the_budget_is_refused_with_its_length(is_shared, tokens):
    plan(items()[:1], token_budget=tokens, is_shared=is_shared)
    with pytest.raises(ConfigError, match=rf"a group takes {tokens} tokens .*_batch = {tokens}"):
        plan(items()[:1], token_budget=tokens - 1, is_shared=is_shared)
