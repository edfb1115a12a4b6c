"""What the tests of operations on hidden states share: small tiles, and inputs to differentiate."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gad_fast.kernels import linear_logprobs_op, linear_tiles
from gad_fast.kernels.linear_tiles import TILES
from gad_fast.kernels.linear_token_logprobs import linear_token_logprobs
from kernel_cases import DEVICE, needs_triton

# Blocks of 32 tokens, 16 of D and 128 of V: none divides its size, and the last tile of V has 44.
T, D, V = 37, 40, 300

# Each path in the dtypes that it takes without rounding logits.
PATHS = [
    pytest.param("triton", torch.bfloat16, marks=needs_triton, id="triton-bf16"),
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("torch", torch.float64, id="torch-fp64"),
]
each_path = pytest.mark.parametrize(("backend", "dtype"), PATHS)


def shrink_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make inputs of that size cross tiles, blocks and slices."""
    for key, tile in TILES.items():
        monkeypatch.setitem(TILES, key, tile._replace(BLOCK_T=32, BLOCK_V=128, BLOCK_D=16))
    merge = linear_tiles.merge_config() | {"BLOCK_T": 16, "BLOCK_J": 2}
    convert = linear_tiles.exp_config(128) | {"BLOCK_V": 128}
    monkeypatch.setattr(linear_tiles, "merge_config", lambda: merge)
    monkeypatch.setattr(linear_tiles, "exp_config", lambda _width: convert)
    monkeypatch.setattr(linear_logprobs_op, "_ROW_MULTIPLE", 32)
    monkeypatch.setattr(linear_logprobs_op, "_COLUMN_MULTIPLE", 128)
    monkeypatch.setattr(linear_logprobs_op, "_MIN_SLICE", 64)


def normal(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors if x is not None]


def logprobs(inputs: list[Tensor], labels: Tensor, **options: Any) -> Any:
    """The operation on hidden states and weight; a tensor, or with the entropy a pair."""
    hidden, weight = inputs
    return linear_token_logprobs(hidden, weight, labels, **options)


def gradients(
    outputs: tuple[Tensor, Tensor], inputs: list[Tensor], used: str = "both"
) -> list[Tensor]:
    """Gradients of a loss with upstream gradients of about 1, of either sign."""
    upstream = {"logp": normal(T, seed=1), "entropy": normal(T, seed=2)}
    losses = [
        (output * upstream[name].to(output)).sum()
        for name, output in zip(upstream, outputs, strict=True)
        if used in (name, "both")
    ]
    return list(torch.autograd.grad(torch.stack(losses).sum(), inputs))
