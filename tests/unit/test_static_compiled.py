"""The static engine with compiled layers samples what it samples without."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from engines import llama, make, requests, tokens
from gad_fast.config import HardwareSettings
from gad_fast.models.loading import Precision
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.static import compiled
from gad_fast.rollout.static.engine import StaticEngine

SAMPLED = Sampling(0.9, 9)
COMPILED = Precision(HardwareSettings(device="cpu", compute_dtype="float32", compile_layers=True))


def gemma3() -> PreTrainedModel:
    """Four layers, every second one with a window."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=16, num_hidden_layers=4, layer_types=kinds, sliding_window=4,
        initializer_range=0.3, max_position_embeddings=64, **sizes, **heads,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize(
    ("make_model", "num_kinds"), [(lambda: llama(num_hidden_layers=4), 1), (gemma3, 2), (gpt2, 1)]
)
def test_layers_that_are_alike_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], PreTrainedModel], num_kinds: int
) -> None:
    """With a backend that runs the graphs as they are, which needs no compiler."""
    graphs, calls = list[Any](), list[Any]()

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *tensors: calls.append(graph) or graph(*tensors)

    forward = torch.compile(compiled._forward, backend=backend, dynamic=True)
    monkeypatch.setattr(compiled, "_compiled", lambda: forward)
    torch.compiler.reset()
    model = make_model()
    expected = tokens(make(StaticEngine, model, 3).generate(requests(2, SAMPLED)))
    assert not calls
    engine = make(StaticEngine, model, 3, precision=COMPILED)
    assert tokens(engine.generate(requests(2, SAMPLED))) == expected
    assert len(calls) % 4 == 0
    assert len(calls) > 4 * 9
    # Sizes that are 1 have code of their own.
    assert len(graphs) <= 3 * num_kinds
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++, and there is no g++")
def test_compiled_code_samples_the_same_tokens() -> None:
    torch.compiler.reset()
    model = llama()
    expected = tokens(make(StaticEngine, model, 3).generate(requests(2, SAMPLED)))
    engine = make(StaticEngine, model, 3, precision=COMPILED)
    assert tokens(engine.generate(requests(2, SAMPLED))) == expected
