"""`group_advantages` against the book in float64, group by group, however the groups are given."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gad_fast.kernels.group_advantages import (
    MAX_BLOCK_G,
    AdvantageOptions,
    group_advantages,
    group_advantages_reference,
)
from kernel_cases import DEVICE, each_backend, needs_triton

MODULE = importlib.import_module("gad_fast.kernels.group_advantages")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": "none"},
    {"leave_one_out": True},
    {"scale": "none", "leave_one_out": True},
    {"eps": 0.3, "std_floor": 0.9},
    {"eps": 0.0},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def rewards_of(B: int, G: int, seed: int = 0) -> Tensor:
    """Groups that differ in mean and in spread, from 0.05 to 5."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1.3, 0.7, B, dtype=torch.float64)[:, None]
    normal = torch.randn(B, G, generator=generator, dtype=torch.float64)
    return (spread * normal + torch.arange(B)[:, None] - 2.5).to(DEVICE)


def book(rewards: Tensor, options: dict) -> Tensor:
    chosen = AdvantageOptions(
        is_scaled=options.get("scale", "std") == "std",
        leave_one_out=options.get("leave_one_out", False),
        eps=options.get("eps", 1e-4),
        std_floor=options.get("std_floor", 0.0),
    )
    return group_advantages_reference(rewards, chosen)


@each_option
@each_backend
@pytest.mark.parametrize("G", [2, 5, 8, 33])
def test_each_group_matches_the_book(backend, options, G):
    rewards = rewards_of(7, G).float()
    expected = torch.stack([book(group, options) for group in rewards.double()])
    actual = group_advantages(rewards, **options, backend=backend)
    assert actual.dtype == torch.float32
    # A few roundings of numbers near 1, and of rewards up to 10 before the mean is taken off.
    assert_close(actual.double(), expected, rtol=2e-6, atol=1e-6)


@each_option
def test_torch_path_keeps_float64(options):
    rewards = rewards_of(7, 5)
    expected = torch.stack([book(group, options) for group in rewards])
    actual = group_advantages(rewards, **options)
    assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@each_backend
def test_flat_rewards_with_a_group_size_are_the_rectangle(backend):
    rewards = rewards_of(7, 5).float()
    flat = group_advantages(rewards.reshape(-1), 5, backend=backend)
    assert flat.shape == (35,)
    assert torch.equal(flat.view(7, 5), group_advantages(rewards, backend=backend))


@each_backend
def test_strided_rewards_are_read_as_they_are(backend):
    rewards = rewards_of(5, 7).float().t()
    expected = group_advantages(rewards.contiguous(), backend=backend)
    assert torch.equal(group_advantages(rewards, backend=backend), expected)


@each_option
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_unequal_groups_in_any_order_match_the_book(options, dtype):
    rewards = rewards_of(1, 23)[0]
    # Groups of 11, 7, 3 and 2, scattered; ids as hashes are: large, negative, with gaps.
    sizes = {2**31 - 1: 11, -5: 7, 0: 3, 40: 2}
    ids = torch.tensor([i for i, size in sizes.items() for _ in range(size)], dtype=dtype)
    ids = ids[torch.randperm(23, generator=torch.Generator().manual_seed(1))].to(DEVICE)
    expected = torch.empty_like(rewards)
    for i in sizes:
        expected[ids == i] = book(rewards[ids == i], options)
    actual = group_advantages(rewards, group_ids=ids, **options)
    assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_ids_of_a_rectangle_give_what_its_shape_gives():
    rewards = rewards_of(7, 5).float()
    ids = torch.arange(7, device=DEVICE).repeat_interleave(5)
    by_id = group_advantages(rewards.reshape(-1), group_ids=ids).view(7, 5)
    assert_close(by_id, group_advantages(rewards, backend="torch"), rtol=1e-6, atol=1e-7)


@each_option
@each_backend
@pytest.mark.parametrize("value", [0.1, -7.3, 1e6, 0.0])
def test_equal_rewards_give_exactly_zero(backend, options, value):
    rewards = torch.full((3, 7), value, device=DEVICE)
    assert not group_advantages(rewards, **options, backend=backend).any()
    ids = torch.arange(21, device=DEVICE) % 4
    assert not group_advantages(rewards.reshape(-1), group_ids=ids, **options).any()


@each_option
@each_backend
def test_a_group_of_one_gives_exactly_zero(backend, options):
    rewards = rewards_of(5, 1).float()
    assert not group_advantages(rewards, **options, backend=backend).any()
    ids = torch.tensor([3, 9, 1, 9, 9], device=DEVICE)
    by_id = group_advantages(rewards[:, 0], group_ids=ids, **options)
    assert torch.equal(by_id != 0, ids == 9)


@each_backend
def test_large_rewards_keep_their_small_differences(backend):
    small = torch.tensor([[0.0, 0.25, 1.0, 0.5]], device=DEVICE)
    expected = group_advantages(small, backend=backend)
    # 2^20 + x is exact for these x; the sum of four is not.
    assert torch.equal(group_advantages(small + 2.0**20, backend=backend), expected)


@each_backend
def test_nan_stays_in_its_group_and_is_not_hidden(backend):
    rewards = torch.ones(3, 3, device=DEVICE)
    rewards[1, 1] = torch.nan
    for options in OPTIONS[:2] + OPTIONS[4:5]:
        advantages = group_advantages(rewards, **options, backend=backend)
        assert torch.equal(advantages.isnan().all(1), torch.tensor([False, True, False]).to(DEVICE))
        assert not advantages[[0, 2]].any()


@each_backend
def test_bfloat16_rewards_are_computed_in_float32(backend):
    rewards = rewards_of(4, 6).bfloat16()
    expected = group_advantages(rewards.float(), backend=backend)
    assert torch.equal(group_advantages(rewards, backend=backend), expected)


@each_backend
def test_advantages_are_constants_to_autograd(backend):
    rewards = rewards_of(4, 6).float().requires_grad_()
    ids = torch.arange(24, device=DEVICE) % 5
    assert not group_advantages(rewards, backend=backend).requires_grad
    assert not group_advantages(rewards.reshape(-1), group_ids=ids).requires_grad


@each_backend
def test_no_groups_give_no_advantages(backend):
    empty = torch.empty(0, 4, device=DEVICE)
    assert group_advantages(empty, backend=backend).shape == (0, 4)
    ids = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert group_advantages(empty.reshape(-1), group_ids=ids).shape == (0,)


@needs_triton
def test_groups_too_large_for_a_program_take_the_torch_path(monkeypatch):
    monkeypatch.setattr(MODULE, "_launch", None)
    rewards = rewards_of(1, MAX_BLOCK_G + 1).float()
    expected = group_advantages(rewards, backend="torch")
    assert torch.equal(group_advantages(rewards, backend="triton"), expected)
    with pytest.raises(TypeError):
        group_advantages(rewards[:, :-1], backend="triton")


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_custom_op_passes_opcheck(backend):
    operation = torch.ops.gad_fast.group_advantages.default
    torch.library.opcheck(operation, (rewards_of(3, 5).float(), True, True, 1e-4, 0.1, backend))


@each_backend
@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_compiles_as_one_graph(backend, has_ids, is_dynamic):
    rewards = rewards_of(3, 5).float().reshape(-1)
    ids = torch.arange(15, device=DEVICE) % 4
    groups: dict[str, Any] = {"group_ids": ids} if has_ids else {"group_size": 5}

    def advantages(rewards):
        return group_advantages(rewards, **groups, std_floor=0.1, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(advantages, fullgraph=True, dynamic=is_dynamic, backend="aot_eager")
    assert torch.equal(compiled(rewards), advantages(rewards))


IDS = torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"rewards must be \[B, G\], or \[N\] with group_size or group_ids, got \(6,\)"),
        ({"rewards": torch.zeros(2, 3), "group_size": 3}, r"got \(2, 3\) with group_size=3"),
        ({"rewards": torch.zeros(1, 2, 3)}, r"rewards must be .*got \(1, 2, 3\)"),
        ({"rewards": torch.zeros(6).long(), "group_size": 3}, r"rewards must be a float tensor"),
        ({"group_size": 4}, r"group_size must be at least 1 and divide the 6 rewards, got 4"),
        ({"group_size": 0}, r"group_size must be at least 1 .*got 0"),
        ({"group_size": 3, "group_ids": IDS}, r"group_ids go with rewards \[N\] and no group_size"),
        (
            {"group_ids": IDS[:5]},
            r"group_ids must have the shape of the rewards, \(6,\), got \(5,\)",
        ),
        ({"group_ids": torch.zeros(6)}, r"group_ids must be integers, got torch\.float32"),
        ({"group_size": 3, "scale": "var"}, r"scale must be one of std, none, got 'var'"),
        ({"group_size": 3, "eps": -1.0}, r"eps must be at least 0, got -1\.0"),
        ({"group_size": 3, "std_floor": -1.0}, r"std_floor must be at least 0, got -1\.0"),
        ({"group_size": 3, "backend": "cuda"}, r"backend must be one of auto, triton, torch"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**{"rewards": torch.zeros(6), **change})
