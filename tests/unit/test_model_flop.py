"""Operations counted from a model's sizes are those that torch counts as it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import tiny
from gad_fast.config import LoraSettings
from gad_fast.models.lora import AdapterSet
from gpu_suite.model_flop import Read, forward_flop, groups_read, training_flop

LENGTH = 7


def products(model: LlamaForCausalLM, *, is_trained: bool) -> int:
    """Operations of the linear layers and the head, as torch counts them."""
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_trained):
        loss = model(ids, use_cache=False).logits.sum()
        if is_trained:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in _PRODUCTS)


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def test_the_products_of_all_layers_and_the_head_are_counted() -> None:
    model = LlamaForCausalLM(tiny.llama_config(num_hidden_layers=3)).eval()
    read = Read(tokens=LENGTH, pairs=0, scored=LENGTH)
    assert forward_flop(model, read, has_head=True) == products(model, is_trained=False)
    assert training_flop(model, read, has_head=True) == products(model, is_trained=True)


def test_frozen_weights_pass_gradients_on_and_take_none() -> None:
    model = LlamaForCausalLM(tiny.llama_config(num_hidden_layers=3)).eval()
    read = Read(tokens=LENGTH, pairs=0, scored=LENGTH)
    forward = forward_flop(model, read, has_head=True)
    AdapterSet(model, LoraSettings(rank=1), "tiny").add("student")
    assert forward_flop(model, read, has_head=True) == forward
    assert training_flop(model, read, has_head=True) == 2 * forward


def test_attention_is_counted_by_what_tokens_see() -> None:
    """A prompt of 3 with responses of 2, twice: 6 pairs in it, and 2 x 3 + 3 of each response."""
    read = groups_read(2, 3, (4, 2))
    assert read == Read(tokens=2 * (3 + 4 * 2), pairs=2 * (6 + 4 * (6 + 3)), scored=2 * 4 * 2)
    config = tiny.llama_config(num_hidden_layers=3, hidden_size=16, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    without = read._replace(pairs=0)
    # A product and a sum for each of the width, in queries by keys and in weights by values.
    attention = 3 * read.pairs * 16 * 2 * 2
    counted = [forward_flop(model, r, has_head=False) for r in (read, without)]
    assert counted[0] - counted[1] == attention
    trained = [training_flop(model, r, has_head=False) for r in (read, without)]
    assert trained[0] - trained[1] == pytest.approx(3 * attention)
