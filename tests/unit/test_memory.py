"""The estimate of memory: what adds to it, and models that cannot play."""

import math

import pytest
from transformers import CohereConfig, Qwen3MoeConfig, T5Config

import tiny
from gad_fast.config import HardwareSettings
from gad_fast.errors import ModelError
from gad_fast.game import memory
from gad_fast.game.memory import memory_gib
from gad_fast.models.loading import Precision, load_config

GIB = 2**30


def estimate(folder, *, recomputes=False, **sections):
    recipe = tiny.recipe(folder, **sections)
    hardware = HardwareSettings(
        device="cpu", compute_dtype="float32", gradient_checkpointing=recomputes
    )
    return memory_gib(recipe, load_config(recipe.student.model), Precision(hardware))


def test_what_stays_is_weights_and_two_moments_of_each_player(tmp_path):
    parts = estimate(tmp_path)
    num_weights = tiny.save_student(tmp_path / "student").num_parameters()
    assert parts["student"] * GIB == 3 * 4 * num_weights
    assert parts["reference"] * GIB == 4 * num_weights
    assert "reference" not in estimate(tmp_path, game={"kl_coef": 0.0})


def test_adapters_share_the_weights_and_have_the_only_moments(tmp_path):
    full, adapters = estimate(tmp_path), estimate(tmp_path, lora={"rank": 1})
    weights = full["student"] / 3
    # Rank 1 of the two layers' linear maps: a row and a column each.
    num_adapter = 2 * (2 * 16 + 2 * (16 + 8) + 2 * 16 + 3 * (16 + 24)) * 1
    assert math.isclose(adapters["student"] * GIB, weights * GIB + 3 * 4 * num_adapter)
    assert math.isclose(adapters["reference"] * GIB, 4 * num_adapter)


def test_a_discriminator_on_the_students_weights_reads_in_their_dtype(tmp_path):
    """Whatever its own section says of weights that it has not."""
    tiny.save_student(tmp_path / "student", num_hidden_layers=8)
    held = {
        dtype: estimate(
            tmp_path,
            lora={"rank": 1},
            student={"dtype": "bfloat16"},
            discriminator={"dtype": dtype},
        )
        for dtype in ("bfloat16", "float32")
    }
    assert held["bfloat16"] == held["float32"]
    alone, part = estimate(tmp_path, lora={"rank": 1}), "activations and logits"
    # Norms and adapters keep what they read in float32.
    assert held["float32"][part] < 0.9 * alone[part]


def test_merging_adapters_is_the_peak_where_passes_hold_little(tmp_path):
    tiny.save_student(tmp_path / "student", hidden_size=64, intermediate_size=2048)
    one_group = {"tokens_per_micro_batch": 40}
    parts = estimate(tmp_path, recomputes=True, lora={"rank": 1}, batch=one_group)
    num_merged = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 2048)
    assert parts["merged weights"] * GIB == 4 * num_merged
    assert "activations and logits" not in parts


def test_a_model_that_shares_no_prompts_fills_the_same_budget_with_rows(tmp_path, monkeypatch):
    """Groups of 16 + 4 x 6 tokens, two at once, or three rows of 22."""
    tiny.save_student(tmp_path / "student", num_hidden_layers=8)
    shared = estimate(tmp_path)["activations and logits"]
    monkeypatch.setattr(memory, "use_row_attention", lambda _: False)
    padded = estimate(tmp_path)["activations and logits"]
    assert 0.6 * shared < padded < 0.95 * shared


def test_recomputed_layers_hold_less_in_a_pass(tmp_path):
    tiny.save_student(tmp_path / "student", num_hidden_layers=8)
    held = [
        estimate(tmp_path, recomputes=recomputes)["activations and logits"]
        for recomputes in (False, True)
    ]
    assert held[1] < 0.5 * held[0]


@pytest.mark.parametrize("config", [T5Config(), CohereConfig()], ids=["no head", "no classifier"])
def test_an_architecture_that_cannot_play_is_told_before_anything_is_loaded(tmp_path, config):
    precision = Precision(HardwareSettings(device="cpu"))
    with pytest.raises(ModelError, match=r"cannot load a model from .*: Unrecognized config"):
        memory_gib(tiny.recipe(tmp_path), config, precision)


def test_what_a_trial_cannot_tell_is_said_to_be_unknown(tmp_path):
    experts = Qwen3MoeConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,  # pyright: ignore[reportCallIssue]
    )
    parts = memory_gib(tiny.recipe(tmp_path), experts, Precision(HardwareSettings(device="cpu")))
    assert math.isnan(parts["activations and logits"])
    assert parts["student"] > 0
