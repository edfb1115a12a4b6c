"""The static engine against the reference and against dense forward passes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny
from engines import CPU, END, PROMPTS, llama, make, requests, tokens
from gad_fast.config import HardwareSettings
from gad_fast.errors import ConfigError, EngineError
from gad_fast.models import few_rows
from gad_fast.models.few_rows import in_blocks
from gad_fast.models.loading import Precision
from gad_fast.rollout import room
from gad_fast.rollout.continuous import ContinuousEngine
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, FinishReason, ModuleWeights, Sampling
from gad_fast.rollout.making import start_engine
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.rollout.static.engine import StaticEngine

GREEDY = Sampling(0.0, 9)
SAMPLED = Sampling(0.9, 9)


def like_llama(config: type[Any], kind: type[Any], **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    values = tiny.llama_config().to_dict()
    keys = ("model_type", "architectures", "rope_parameters", "head_dim")
    return kind(config(**{k: v for k, v in values.items() if k not in keys} | overrides)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, initializer_range=0.3, **sizes)).eval()


def mistral(window: int | None) -> PreTrainedModel:
    return like_llama(MistralConfig, MistralForCausalLM, sliding_window=window)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": lambda: like_llama(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: like_llama(Qwen3Config, Qwen3ForCausalLM, head_dim=8),
    "gemma2": lambda: like_llama(
        Gemma2Config, Gemma2ForCausalLM, head_dim=8, sliding_window=40, attn_logit_softcapping=2.0
    ),
    "gemma2-eager": lambda: like_llama(
        Gemma2Config, Gemma2ForCausalLM, head_dim=8, sliding_window=40, attn_implementation="eager"
    ),
    "mistral": lambda: mistral(None),
    "mistral, narrow": lambda: mistral(3),
    "gemma2, narrow": lambda: like_llama(
        Gemma2Config, Gemma2ForCausalLM, head_dim=8, sliding_window=5
    ),
    "gemma3, narrow": lambda: like_llama(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen2, narrow": lambda: like_llama(
        Qwen2Config,
        Qwen2ForCausalLM,
        use_sliding_window=True,
        sliding_window=2,
        max_window_layers=1,
    ),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_the_references(name: str, rows: int) -> None:
    """Prompts of one to seven tokens; in one and three rows, rollouts wait for others to finish."""
    model = ARCHITECTURES[name]()
    wanted = requests(2, GREEDY)
    own = model.config._attn_implementation
    expected = tokens(make(ReferenceEngine, model).generate(wanted))
    assert len(expected) == 2 * len(PROMPTS)
    assert len({tuple(ids) for ids in expected.values()}) > 2
    assert tokens(make(StaticEngine, model, rows).generate(wanted)) == expected
    assert model.config._attn_implementation == own


def test_rollouts_depend_on_nothing_but_their_request_number_and_seed() -> None:
    model = llama()
    wanted = requests(5, SAMPLED)
    expected = tokens(make(StaticEngine, model).generate(wanted))
    for rows in (1, 2, 7):
        assert tokens(make(StaticEngine, model, rows).generate(wanted)) == expected
    engine = make(StaticEngine, model, 4)
    assert tokens(engine.generate(wanted[::-1])) == expected
    alone = tokens(engine.generate([wanted[2]]))
    assert alone == {key: ids for key, ids in expected.items() if key[0] == 2}
    assert len({tuple(ids) for ids in expected.values()}) > 15
    other = tokens(engine.generate(requests(5, SAMPLED, seed=12)))
    assert sum(other[key] == expected[key] for key in expected) < 3


@pytest.mark.parametrize(
    ("temperature", "name"), [(0.7, "llama"), (0.0, "llama"), (1.0, "gpt2"), (1.3, "gemma2")]
)
def test_logprobs_equal_a_dense_forward_pass(temperature: float, name: str) -> None:
    model = ARCHITECTURES[name]()
    outputs = list(make(StaticEngine, model, 3).generate(requests(4, Sampling(temperature, 9))))
    for output in outputs:
        prompt, ids = PROMPTS[output.group_id], output.response.ids.tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(ids)), ids]
        assert output.logprobs is not None
        assert_close(torch.from_numpy(output.logprobs), expected, atol=1e-5, rtol=0)


def test_the_second_token_is_drawn_from_the_exact_distribution() -> None:
    """Chi-square of 4000 draws, after whichever first token; 300 rows are refilled as they end."""
    model, temperature = llama(initializer_range=0.1), 0.7
    sampling = Sampling(temperature, 2)
    outputs = make(StaticEngine, model, 300).generate(requests(4000, sampling, PROMPTS[:1]))
    pairs = [output.response.ids.tolist() for output in outputs]
    counts = torch.zeros(16, 16, dtype=torch.float64)
    for first, second in (pair for pair in pairs if len(pair) == 2):
        counts[first, second] += 1
    with torch.no_grad():
        rows = torch.tensor([[*PROMPTS[0], first] for first in range(16)])
        p = (model(input_ids=rows).logits[:, -1].double() / temperature).softmax(-1)
    expected = p * counts.sum(-1, keepdim=True)
    usual = expected > 5
    statistic = float(((counts - expected) ** 2 / expected)[usual].sum())
    degrees = int(usual.sum()) - 15
    assert degrees > 150
    assert counts[END].sum() == 0
    # Wilson-Hilferty: the 0.1 % point of chi-square.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_an_update_in_place_is_seen_at_once() -> None:
    model, changed = llama(), llama(seed=5)
    engine = make(StaticEngine, model, 3)
    before = tokens(engine.generate(requests(3, SAMPLED)))
    model.load_state_dict(changed.state_dict())
    report = engine.sync_weights(ModuleWeights(model), version=1)
    assert (report.weight_version, report.num_tensors) == (1, 0)
    outputs = list(engine.generate(requests(3, SAMPLED)))
    assert {output.weight_version for output in outputs} == {1}
    after = tokens(iter(outputs))
    assert after == tokens(make(StaticEngine, changed, 3).generate(requests(3, SAMPLED)))
    assert after != before


def test_under_autocast_logprobs_are_the_trainers_and_the_caller_stays_outside() -> None:
    precision = Precision(HardwareSettings(device="cpu", compute_dtype="bfloat16"))
    model = llama()
    for output in make(StaticEngine, model, 3, precision=precision).generate(requests(3, SAMPLED)):
        assert not torch.is_autocast_enabled("cpu")
        prompt, ids = PROMPTS[output.group_id], output.response.ids.tolist()
        with torch.no_grad(), precision.autocast():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.float() / 0.9).log_softmax(-1)[range(len(ids)), ids]
        assert output.logprobs is not None
        assert_close(torch.from_numpy(output.logprobs), expected, atol=0.15, rtol=0)
    assert model.lm_head.weight.dtype == torch.float32


def test_gradients_flow_after_sampling_under_autocast() -> None:
    """Weights cast for sampling, without gradients, must not be those of the next training pass."""
    precision = Precision(HardwareSettings(device="cpu", compute_dtype="bfloat16"))
    model = llama()
    list(make(StaticEngine, model, 3, precision=precision).generate(requests(1, SAMPLED)))
    with precision.autocast():
        model(input_ids=torch.tensor([PROMPTS[0]])).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.lm_head.parameters())


class _Spelling:
    """A stream of text in which token t is the letter of its number."""

    def __init__(self, stop: Any) -> None:
        self.text, self.stop = "", stop

    def push(self, id: int, /) -> str:
        self.text += chr(ord("a") + id)
        return ""

    @property
    def is_stopped(self) -> bool:
        return any(string in self.text for string in self.stop)


@pytest.mark.parametrize("kind", [StaticEngine, ContinuousEngine, ReferenceEngine])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(kind: type[Any]) -> None:
    model = llama()
    free = tokens(make(kind, model).generate(requests(1, GREEDY)))
    stop = "".join(chr(ord("a") + token) for token in free[1, 0][1:4])
    sampling = Sampling(0.0, 9, stop=("zz", stop))
    engine = make(kind, model, endings=Endings(END, _Spelling))
    outputs = {o.group_id: o for o in engine.generate(requests(1, sampling))}
    assert outputs[1].response.ids.tolist() == free[1, 0][:4]
    assert outputs[1].finish_reason is FinishReason.STOP
    assert not outputs[1].response.is_finished
    if outputs[1].logprobs is not None:
        assert len(outputs[1].logprobs) == 4


@pytest.mark.parametrize("kind", [StaticEngine, ContinuousEngine, ReferenceEngine])
def test_top_k_of_one_is_greedy_and_reasons_are_told(kind: type[Any]) -> None:
    model = llama()
    greedy = tokens(make(kind, model).generate(requests(1, GREEDY)))
    outputs = list(make(kind, model).generate(requests(1, Sampling(1.0, 9, top_k=1))))
    assert tokens(iter(outputs)) == greedy
    for output in outputs:
        has_end = output.response.ids[-1] == END
        assert output.finish_reason is (FinishReason.END if has_end else FinishReason.LENGTH)
        assert has_end == output.response.is_finished


def test_models_whose_cache_is_no_row_of_keys_and_values_fall_back_and_say_so() -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=2)
    ).eval()
    # Its own attention has no window to give: of 3 tokens the check sees it, of 12 it cannot.
    eager, wide = (
        like_llama(
            MistralConfig, MistralForCausalLM, sliding_window=window, attn_implementation="eager"
        )
        for window in (3, 12)
    )
    for model, expected, reason in (
        (eager, ContinuousEngine, "so continuous is next: its log-probabilities are"),
        (wide, ContinuousEngine, "so continuous is next: its layers see 12 tokens in a way of"),
        (mamba, ReferenceEngine, "a short answer failed"),
        (mistral(12), StaticEngine, None),
    ):
        said: list[str] = []
        capacity = Capacity(4, longest_sequence=16)
        engine = start_engine(
            "static", model, CPU, endings=Endings(END), capacity=capacity, say=said.append
        )
        assert type(engine) is expected
        assert (reason is None and not said) or (reason is not None and reason in said[0])
        reference = make(ReferenceEngine, model)
        wanted = requests(1, GREEDY)
        assert tokens(engine.generate(wanted)) == tokens(reference.generate(wanted))


def test_float32_products_are_those_of_blocks_of_columns_while_sampling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ARCHITECTURES["qwen2"]()  # has biases
    wanted = requests(3, SAMPLED)
    expected = tokens(make(StaticEngine, model).generate(wanted))
    calls: list[int] = []

    def noted(rows: Any, weight: Any, bias: Any, num_blocks: int) -> Any:
        calls.append(num_blocks)
        return in_blocks(rows, weight, bias, num_blocks)

    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(few_rows, "in_blocks", noted)
    monkeypatch.setattr(few_rows, "SMALLEST_WEIGHTS", 0)
    monkeypatch.setattr(few_rows, "BLOCK_COLUMNS", range(4, 9))
    assert tokens(make(StaticEngine, model).generate(wanted)) == expected
    assert set(calls) == {2, 3}
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'vllm', allowed: static, continuous"):
        start_engine(
            "vllm", llama(), CPU, endings=Endings(END), capacity=Capacity(1), say=lambda _: None
        )


@pytest.mark.parametrize("kind", [StaticEngine, ContinuousEngine, ReferenceEngine])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 56, "prompt 1 has 56 tokens and max_tokens is 9, but the model reads at most 64"),
        ([], "prompt 1 has no tokens"),
    ],
)
def test_a_prompt_that_does_not_fit_is_told_before_any_work(
    kind: type[Any], prompt: list[int], message: str
) -> None:
    engine = make(kind, llama())
    with pytest.raises(EngineError, match=message):
        next(engine.generate(requests(1, GREEDY, [[5], prompt])))
    assert len(tokens(engine.generate(requests(1, GREEDY, [[5] * 55])))) == 1


@pytest.mark.parametrize(
    ("kind", "columns", "fit"), [(StaticEngine, 15, 9), (ContinuousEngine, 32, 4)]
)
def test_too_little_memory_is_told_with_the_rows_that_fit(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], columns: int, fit: int
) -> None:
    """Two layers of 8 keys and 8 values: 128 bytes a token, 10 % left free; pages of 32 columns."""
    engine = make(kind, llama())
    monkeypatch.setattr(room, "_free_bytes", lambda _device: 10 * 128 * 15)
    message = (
        rf"12 rollouts of {columns} tokens .* {fit} rollouts fit \(set max_sequences = {fit}\)"
    )
    with pytest.raises(EngineError, match=message):
        next(engine.generate(requests(3, GREEDY)))
    assert len(list(engine.generate(requests(1, GREEDY)))) == 4


@pytest.mark.parametrize("kind", [StaticEngine, ReferenceEngine])
def test_memory_that_runs_out_is_told_with_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    model = llama()
    engine = make(kind, model)

    def exhausted(*_args: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", exhausted)
    message = r"out of memory with 12 rollouts at once: tried to .* \(set max_sequences = 6\)"
    with pytest.raises(EngineError, match=message):
        next(engine.generate(requests(3, GREEDY)))


def test_a_budget_of_cached_tokens_bounds_the_rows() -> None:
    capacity = Capacity(64, max_cached_tokens=50, longest_sequence=40)
    assert [capacity.rows(columns) for columns in (10, 15, 16, 25, 26, 51)] == [5, 3, 3, 2, 1, 1]
    model = llama()
    engine = make(StaticEngine, model, capacity=capacity)
    expected = tokens(make(StaticEngine, model).generate(requests(2, SAMPLED)))
    assert tokens(engine.generate(requests(2, SAMPLED))) == expected


def test_broken_weights_are_told() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    engine = make(StaticEngine, model)
    for sampling in (SAMPLED, GREEDY):
        with pytest.raises(EngineError, match="the student's logits are not finite"):
            list(engine.generate(requests(1, sampling)))


def test_a_prompt_is_computed_once_for_all_its_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the rollouts enter one after the other; the last token is every rollout's own."""
    model, seen = llama(), list[int]()
    engine = make(StaticEngine, model, 2)
    forward: Any = type(model).forward

    def counted(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[1] > 1:
            seen.extend(input_ids.flatten().tolist())
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    assert len(list(engine.generate(requests(5, SAMPLED, PROMPTS[:1])))) == 5
    assert seen == PROMPTS[0][:-1]


def test_requests_of_many_lengths_fill_the_cache_in_batches_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gad_fast.rollout.static import decoder

    model = llama()
    random = np.random.default_rng(0)
    prompts = [random.integers(16, size=length).tolist() for length in (9, 2, 30, 17, 5, 1, 12)]
    wanted = requests(2, GREEDY, prompts)
    expected = tokens(make(ReferenceEngine, model).generate(wanted))
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 20)
    assert tokens(make(StaticEngine, model, 5).generate(wanted)) == expected
