"""What a trial without data finds is what autograd keeps of real tensors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import tiny
from gad_fast.models.attention import use_row_attention
from gad_fast.models.batch import Batch, Item
from gad_fast.models.live_bytes import pass_bytes
from gad_fast.models.micro_batches import lay_out
from gad_fast.records import Response


def some_batch(*, is_shared: bool) -> Batch:
    def ids(length: int) -> Any:
        return np.arange(length, dtype=np.int32) % 5

    items = [Item(ids(9), [Response(ids(n), is_finished=True) for n in (7, 5, 6)])] * 2
    return lay_out(items, is_shared=is_shared, pad_id=0, device=torch.device("cpu"))


def run(model: PreTrainedModel, batch: Batch) -> Tensor:
    assert use_row_attention(model)
    output: Any = model.base_model(**batch.model_inputs, use_cache=False)
    return output.last_hidden_state


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()  # pyright: ignore[reportArgumentType]


def kept_by_autograd(model: PreTrainedModel, batch: Batch) -> int:
    """Bytes of all that a real pass keeps for the backward pass, weights and inputs aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in batch.model_inputs.values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(model, batch)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_a_pass_keeps_what_autograd_keeps(is_shared: bool, num_layers: int) -> None:
    config = tiny.llama_config(num_hidden_layers=num_layers)
    batch = some_batch(is_shared=is_shared)
    expected = kept_by_autograd(LlamaForCausalLM(config).eval(), batch)
    held = pass_bytes(config, without_weights, run, batch)
    # The output itself is held as well, and a few rows of numbers.
    assert expected <= held.after_forward < expected + 3 * 4 * batch.input_ids.numel() * 16
    assert held.at_peak > held.after_forward


def test_large_embeddings_do_not_hide_the_layers() -> None:
    """Their gradient is the peak of one layer, and of two, but not of fifty."""
    batch = some_batch(is_shared=True)
    held = {
        num_layers: pass_bytes(
            tiny.llama_config(num_hidden_layers=num_layers, vocab_size=5000),
            without_weights,
            run,
            batch,
        )
        for num_layers in (1, 2, 49, 50)
    }
    gradient = 4 * 5000 * 16
    assert gradient < held[1].at_peak == held[2].at_peak < 1.2 * gradient
    a_layer = held[2].after_forward - held[1].after_forward
    assert held[50].at_peak == held[49].at_peak + a_layer
    assert held[50].at_peak > held[50].after_forward > 48 * a_layer
