"""The operations on scores and log-probabilities, each beside the same maths in plain torch.

Each takes its leaves, and gives a tensor to differentiate; what else it needs it was made with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gad_fast import kernels
from gpu_suite.data import logits_problem
from gpu_suite.operations import CLIP, KL_COEF, plain_logprobs, policy_loss_of
from gpu_suite.scale import Scale, Shape


class SmallProblem(NamedTuple):
    """One call, and what it should compute of leaves in float64."""

    leaves: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def small_problems(scale: Scale) -> dict[str, Callable[[], SmallProblem]]:
    """By operation; made when called, on the device."""
    return {
        "policy_loss": lambda: _policy_loss(scale),
        "group_advantages": lambda: _group_advantages(scale),
        "last_token_score": lambda: _last_token_score(scale),
        "bradley_terry_loss": lambda: _bradley_terry_loss(scale),
    }


def _policy_loss(scale: Scale) -> SmallProblem:
    # Few columns: only the log-probabilities of the problem are wanted.
    shape = Shape(max(scale.num_tokens), 64)
    x, _, tokens = logits_problem(shape, scale, "float32", is_masked=True)
    logp = plain_logprobs(x, None, tokens)

    def ours(logp: Tensor) -> Tensor:
        loss, _ = kernels.policy_loss(
            logp, tokens.old_logp, tokens.advantages, tokens.mask, ref_logp=tokens.ref_logp,
            kl_coef=KL_COEF, clip_low=CLIP, clip_high=CLIP, num_tokens=tokens.num_tokens,
        )  # fmt: skip
        return loss

    return SmallProblem((logp,), ours, lambda logp: policy_loss_of(logp, tokens.of(slice(None))))


def _group_advantages(scale: Scale) -> SmallProblem:
    rewards = _normal(scale, *scale.groups)
    rewards[0] = 0.1  # a group that is all alike

    def plain(rewards: Tensor) -> Tensor:
        centred = rewards - rewards.mean(1, keepdim=True)
        is_alike = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
        scaled = centred / (rewards.std(1, keepdim=True) + 1e-4)
        return torch.where(is_alike, 0.0, scaled)

    return SmallProblem((rewards,), kernels.group_advantages, plain)


def _last_token_score(scale: Scale) -> SmallProblem:
    """Sequences of all lengths, padded to the longest."""
    B, L, D = 16, max(1, max(scale.num_tokens) // 16), scale.widths[-1]
    hidden = _normal(scale, B, L, D).to(getattr(torch, scale.dtype))
    weight, bias = _normal(scale, D) / D**0.5, _normal(scale, 1)
    lengths = 1 + torch.arange(B, device=scale.device) % L

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.last_token_score(hidden, weight, bias, lengths=lengths)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = torch.arange(B, device=hidden.device)
        return hidden[rows, lengths - 1].to(weight.dtype) @ weight + bias

    return SmallProblem((hidden, weight, bias), ours, plain)


def _bradley_terry_loss(scale: Scale) -> SmallProblem:
    B, G = scale.groups

    def ours(teacher: Tensor, student: Tensor) -> Tensor:
        return kernels.bradley_terry_loss(teacher, student)[0]

    def plain(teacher: Tensor, student: Tensor) -> Tensor:
        return softplus(student - teacher[:, None]).mean()

    return SmallProblem((_normal(scale, B), _normal(scale, B, G)), ours, plain)


def _normal(scale: Scale, *shape: int) -> Tensor:
    generator = torch.Generator(scale.device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=scale.device)
