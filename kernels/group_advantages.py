"""Group advantages: each rollout's reward against the other rollouts of its prompt.

For the n rewards r_1..r_n of one group,

    m = mean_i r_i          s = sqrt(sum_i (r_i - m)^2 / (n - 1))
    centred_i = r_i - m, or with leave_one_out r_i - mean_{j != i} r_j = (r_i - m) n / (n - 1)
    A_i = centred_i / (max(s, std_floor) + eps) under scale="std", centred_i under "none"

All of it is computed of d_i = r_i - r_1. That changes no value, keeps small differences of large
rewards, and makes the advantages of equal rewards, and of a group of one, exactly 0: the mean of
equal numbers may be off by a rounding, which divided by eps would be noise of full size.

Rectangular rewards take one Triton program a group. Groups told apart by ids are sorted together
and reduced segment by segment, without atomics and without waiting for the device.

Shapes: B groups of G rollouts, N rollouts in all.

Sources: paper appendix A.1, A_i = (r_i - mean r) / std r; Dr. GRPO arXiv 2503.20783 (no scaling);
RLOO arXiv 2402.14740 (the mean of the others).
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gad_fast.kernels.arguments import (
    check_choice,
    check_device,
    check_float,
    check_range,
    check_shape,
    compute_dtype,
)
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.optional_triton import tl, triton
from gad_fast.kernels.sequences import Sequences

Scale = Literal["std", "none"]


class AdvantageOptions(NamedTuple):
    """What to compute of a group; in the order in which the operation takes it."""

    is_scaled: bool
    leave_one_out: bool
    eps: float
    std_floor: float


def group_advantages_reference(rewards: Tensor, options: AdvantageOptions) -> Tensor:
    """Advantages [n] of one group of at least two rewards [n], by the book: the truth in tests."""
    baseline = rewards.mean().expand_as(rewards)
    if options.leave_one_out:
        baseline = (rewards.sum() - rewards) / (rewards.numel() - 1)
    centred = rewards - baseline
    if not options.is_scaled:
        return centred
    return centred / (rewards.std().clamp_min(options.std_floor) + options.eps)


@triton.jit
def group_advantages_kernel(
    rewards,  # [B, G]
    advantages,  # [B, G]
    eps,
    std_floor,
    G: tl.constexpr,
    DEGREES: tl.constexpr,  # of freedom, max(G - 1, 1)
    IS_SCALED: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program a group, which is read once and stays in registers."""
    start = tl.program_id(0).to(tl.int64) * G
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    first = tl.load(rewards + start)
    b_d = tl.load(rewards + start + o_g, mask=m_g, other=0.0) - first
    b_d = tl.where(m_g, b_d, 0.0)
    b_centred = tl.where(m_g, b_d - tl.sum(b_d, 0) / G, 0.0)
    b_advantage = b_centred
    if LEAVE_ONE_OUT:
        b_advantage = b_centred * (G / DEGREES)
    if IS_SCALED:
        std = tl.sqrt(tl.sum(b_centred * b_centred, 0) / DEGREES)
        b_advantage /= tl.maximum(std, std_floor) + eps
        b_advantage = tl.where(b_centred == 0, 0.0, b_advantage)  # 0 / 0 without eps is NaN
    tl.store(advantages + start + o_g, b_advantage, mask=m_g)


# Above it a group no longer fits the registers of a program, and torch computes.
MAX_BLOCK_G = 8192


def launch_config(G: int) -> dict[str, Any]:
    """Sizes and warps for a group: a plain function, so that no launch needs an autotuner."""
    block = triton.next_power_of_2(G)
    num_warps = min(8, max(1, block // 256))
    return {"G": G, "DEGREES": max(G - 1, 1), "BLOCK_G": block, "num_warps": num_warps}


# Opaque to torch.compile, which so cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::group_advantages", mutates_args=())
def _group_advantages_op(
    rewards: Tensor,
    is_scaled: bool,
    leave_one_out: bool,
    eps: float,
    std_floor: float,
    backend: str,
) -> Tensor:
    """Advantages `[B, G]` of contiguous rewards `[B, G]`."""
    options = AdvantageOptions(is_scaled, leave_one_out, eps, std_floor)
    if backend == "triton":
        return _launch(rewards, options)
    starts = torch.arange(0, rewards.numel(), rewards.shape[1], device=rewards.device)
    groups = Sequences(rewards.shape, None)
    return _torch_group_advantages(rewards.reshape(-1), groups, starts, options).view_as(rewards)


@_group_advantages_op.register_fake
def _(rewards: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(rewards)


def _launch(rewards: Tensor, options: AdvantageOptions) -> Tensor:
    B, G = rewards.shape
    advantages = torch.empty_like(rewards)
    if B > 0:
        with torch.cuda.device_of(rewards):
            group_advantages_kernel[(B,)](
                rewards,
                advantages,
                options.eps,
                options.std_floor,
                **launch_config(G),
                IS_SCALED=options.is_scaled,  # pyright: ignore[reportArgumentType]
                LEAVE_ONE_OUT=options.leave_one_out,  # pyright: ignore[reportArgumentType]
            )
    return advantages


def _torch_group_advantages(
    rewards: Tensor, groups: Sequences, starts: Tensor, options: AdvantageOptions
) -> Tensor:
    """Advantages [N] of rewards [N], whose groups lie end to end from each of `starts`."""
    counts = groups.sums(torch.ones_like(rewards)).clamp_min(1)
    degrees = (counts - 1).clamp_min(1)
    d = rewards - groups.spread(rewards[starts])
    centred = d - groups.spread(groups.sums(d) / counts)
    advantages = centred * groups.spread(counts / degrees) if options.leave_one_out else centred
    if not options.is_scaled:
        return advantages
    std = (groups.sums(centred.square()) / degrees).sqrt()
    advantages = advantages / groups.spread(std.clamp_min(options.std_floor) + options.eps)
    return advantages.masked_fill(centred == 0, 0.0)  # 0 / 0 without eps is NaN


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: Scale = "std",
    leave_one_out: bool = False,
    eps: float = 1e-4,
    std_floor: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Centred and, on demand, scaled rewards of each group; a constant to autograd.

    Scaling by "std" gives noise the full step size once nothing tells the rollouts of a group
    apart; a floor, or no scaling, avoids that.

    Args:
        rewards: float `[B, G]`, or `[N]` with one of the two ways to tell groups apart.
        group_size: G, where each G rewards in a row are a group.
        group_ids: int `[N]`, equal within a group; any values, any order, groups of any sizes.
        scale: "std" divides by the sample standard deviation of the group, "none" does not.
        leave_one_out: whether to subtract the mean of the others in place of that of all.
        eps: at least 0; added to the standard deviation, in units of the reward.
        std_floor: at least 0; least standard deviation to divide by, in units of the reward.
        backend: "auto" is "triton" on CUDA where Triton is installed, else "torch"; torch computes
            float64, groups told apart by ids and groups above 8192 in either case.

    Returns:
        Float of the shape of the rewards, float32, or float64 for float64 rewards; exactly 0 in a
        group whose rewards are all equal, and in a group of one.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    check_float("rewards", rewards)
    check_choice("scale", scale, get_args(Scale))
    check_range("eps", eps, 0.0)
    check_range("std_floor", std_floor, 0.0)
    options = AdvantageOptions(scale == "std", leave_one_out, eps, std_floor)
    values = rewards.detach().to(compute_dtype(rewards.dtype))
    path = resolve_backend(values, backend, dtypes=(torch.float32,))
    if group_ids is not None:
        _check_ids(group_ids, rewards, group_size)
        return _advantages_by_id(values, group_ids, options)
    rectangle = _rectangle(values, group_size)
    if rectangle.shape[1] > MAX_BLOCK_G:
        path = "torch"
    return _group_advantages_op(rectangle, *options, path).view(rewards.shape)


def _rectangle(rewards: Tensor, group_size: int | None) -> Tensor:
    """Rewards as contiguous [B, G]; raises ValueError where they are not whole groups."""
    is_flat = rewards.dim() == 1
    if rewards.dim() not in (1, 2) or is_flat == (group_size is None):
        msg = (
            "rewards must be [B, G], or [N] with group_size or group_ids, "
            f"got {tuple(rewards.shape)} with group_size={group_size}"
        )
        raise ValueError(msg)
    G = rewards.shape[1] if group_size is None else group_size
    if G < 1 or rewards.numel() % G != 0:
        msg = f"group_size must be at least 1 and divide the {rewards.numel()} rewards, got {G}"
        raise ValueError(msg)
    return rewards.reshape(-1, G).contiguous()


def _check_ids(group_ids: Tensor, rewards: Tensor, group_size: int | None) -> None:
    if group_size is not None or rewards.dim() != 1:
        msg = (
            "group_ids go with rewards [N] and no group_size, "
            f"got {tuple(rewards.shape)} with group_size={group_size}"
        )
        raise ValueError(msg)
    check_shape("group_ids", group_ids, rewards.shape, of="the rewards")
    check_device("group_ids", group_ids, rewards.device)
    if group_ids.is_floating_point() or group_ids.is_complex():
        msg = f"group_ids must be integers, got {group_ids.dtype}"
        raise ValueError(msg)


def _advantages_by_id(rewards: Tensor, group_ids: Tensor, options: AdvantageOptions) -> Tensor:
    """Advantages [N] in the order of the rewards."""
    N = rewards.numel()
    if N == 0:
        return rewards.clone()
    ids, order = group_ids.sort(stable=True)
    is_new = ids[1:] != ids[:-1]
    rank = torch.nn.functional.pad(is_new.long().cumsum(0), (1, 0))  # [N], of its group
    # There are at most N groups; how many is not asked, since that would wait for the device. Those
    # beyond the last are empty, and start at N.
    offsets = torch.searchsorted(rank, torch.arange(N + 1, device=rank.device))
    starts = offsets[:-1].clamp(max=N - 1)
    groups = Sequences(rewards.shape, offsets)
    advantages = _torch_group_advantages(rewards[order], groups, starts, options)
    return advantages[order.argsort()]
