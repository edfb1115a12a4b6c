"""The reference engine: what it samples, and what it must not take over from a model's files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import tiny
from gad_fast.config import HardwareSettings
from gad_fast.models.batch import Item, pad
from gad_fast.models.loading import Precision
from gad_fast.models.student import Student
from gad_fast.records import Response
from gad_fast.rollout.engine import GenOutput, GenRequest, ModuleWeights, Sampling
from gad_fast.rollout.reference import ReferenceEngine

END = 4
CPU = Precision(HardwareSettings(device="cpu", compute_dtype="float32"))
PROMPTS = [[1, 2, 7, 3], [1, 2, 7, 8, 9, 10, 3], [1, 2, 9, 3]]


def llama(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama_config(**overrides)).eval()


def requests(
    n: int, temperature: float, prompts: Sequence[list[int]] = PROMPTS
) -> list[GenRequest]:
    sampling = Sampling(temperature, max_tokens=5)
    return [
        GenRequest(group_id, np.array(prompt, dtype=np.int32), n, sampling, seed=11)
        for group_id, prompt in enumerate(prompts)
    ]


def generate(model: Any, wanted: list[GenRequest], max_sequences: int = 64) -> list[GenOutput]:
    engine = ReferenceEngine(lambda: model, CPU, end_id=END, max_sequences=max_sequences)
    return list(engine.generate(wanted))


def greedy_by_hand(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("max_sequences", [1, 2, 64])
def test_greedy_rollouts_equal_a_loop_without_cache_or_padding(max_sequences: int) -> None:
    model = llama()
    outputs = generate(model, requests(1, 0.0), max_sequences)
    by_group = {output.group_id: output.response.ids.tolist() for output in outputs}
    assert by_group == {i: greedy_by_hand(model, prompt) for i, prompt in enumerate(PROMPTS)}


def test_a_window_of_one_token_is_generated_right() -> None:
    """transformers' sliding cache is wrong there."""
    torch.manual_seed(3)
    config = MistralConfig.from_dict({**tiny.llama_config().to_dict(), "sliding_window": 1})
    model = MistralForCausalLM(config).eval()
    outputs = generate(model, requests(1, 0.0))
    by_group = {output.group_id: output.response.ids.tolist() for output in outputs}
    assert by_group == {i: greedy_by_hand(model, prompt) for i, prompt in enumerate(PROMPTS)}


def test_settings_hidden_in_the_model_change_nothing_and_survive() -> None:
    model = llama()
    expected = [output.response.ids.tolist() for output in generate(model, requests(6, 0.9))]
    hidden = GenerationConfig(
        repetition_penalty=5.0, top_k=1, top_p=0.1, eos_token_id=[END, 7, 8], suppress_tokens=[9]
    )
    model.generation_config = hidden
    assert [o.response.ids.tolist() for o in generate(model, requests(6, 0.9))] == expected
    assert model.generation_config is hidden


def test_the_same_seed_gives_the_same_rollouts_and_leaves_the_global_stream_alone() -> None:
    model = llama()
    torch.manual_seed(5)
    first = [output.response.ids.tolist() for output in generate(model, requests(4, 1.0))]
    following = torch.rand(1)
    torch.manual_seed(6)
    assert [output.response.ids.tolist() for output in generate(model, requests(4, 1.0))] == first
    torch.manual_seed(5)
    assert torch.rand(1) == following


def test_the_first_token_is_drawn_from_the_tempered_distribution() -> None:
    """Chi-square of 4000 draws against the exact probabilities of a dense forward pass."""
    model, temperature = llama(initializer_range=0.1), 0.7
    outputs = generate(model, requests(4000, temperature, PROMPTS[:1]), max_sequences=4000)
    counts = torch.bincount(
        torch.tensor([int(output.response.ids[0]) for output in outputs]), minlength=16
    ).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1) * 4000
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 0.1 % point at 15 degrees


def test_rollouts_end_with_the_end_token_or_at_the_limit() -> None:
    outputs = generate(llama(), requests(40, 1.5))
    assert len(outputs) == 120
    for output in outputs:
        ids = output.response.ids.tolist()
        assert (END in ids) == output.response.is_finished
        assert ids.index(END) == len(ids) - 1 if output.response.is_finished else len(ids) == 5


def test_outputs_carry_the_version_of_the_weights() -> None:
    model = llama()
    engine = ReferenceEngine(lambda: model, CPU, end_id=END, max_sequences=8)
    assert {output.weight_version for output in engine.generate(requests(1, 1.0))} == {0}
    weights = ModuleWeights(model)
    report = engine.sync_weights(weights, version=3)
    assert (report.weight_version, report.num_tensors) == (3, 0)
    assert {output.weight_version for output in engine.generate(requests(1, 1.0))} == {3}
    assert len(weights.metadata()) == len(list(weights)) == len(list(model.parameters()))


def test_response_logprobs_equal_a_forward_pass_of_each_sequence_alone() -> None:
    student = Student(llama(), CPU)
    prompts = [np.array(prompt, dtype=np.int32) for prompt in PROMPTS]
    texts = [[5, 6, END], [7], [8, 9, 10, 11, 12]]
    responses = [Response(np.array(ids, dtype=np.int32), is_finished=True) for ids in texts]
    items = [Item(*row) for row in zip(prompts, [[r] for r in responses], strict=True)]
    batch = pad(items, pad_id=0, device=CPU.device)
    with torch.no_grad():
        ours = student.response_logprobs(batch, temperature=0.8)
        expected = []
        for prompt, response in zip(PROMPTS, texts, strict=True):
            logits = student.model(input_ids=torch.tensor([prompt + response])).logits[0] / 0.8
            rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    assert_close(ours, torch.cat(expected), atol=1e-5, rtol=1e-5)
