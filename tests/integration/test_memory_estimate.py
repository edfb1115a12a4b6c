"""What a dry run says of memory is what a run takes."""

from pathlib import Path

import pytest

import tiny
from memory import estimate, measure_in_a_process

# As wide as a model must be for its tensors to outweigh Python's objects.
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}


@pytest.mark.parametrize("case", ["all weights, float32", "adapters"])
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path, case: str) -> None:
    tiny.save_student(tmp_path / "student", **SIZES)
    arguments = (str(tmp_path / "student"), case, 700)
    ratio = sum(estimate(*arguments).values()) / measure_in_a_process(*arguments)
    # benchmarks/memory.py has real sizes, and the limit of 15 %.
    assert 0.75 < ratio < 1.3
