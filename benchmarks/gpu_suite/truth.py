"""Values and gradients of an operation against its plain version in float64, chunk by chunk.

All rows are compared, not a sample: a row that nothing wrote, or wrote twice, is one of few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpu_suite.data import Problem
from gpu_suite.operations import Pair

# Copies of a chunk's logits that plain float64 autograd holds at its peak.
_COPIES = 6


class Distance:
    """How far numbers are from what they should be, gathered part by part on the device."""

    def __init__(self) -> None:
        self._largest = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)
        self._norm = torch.zeros((), dtype=torch.float64)

    def add(self, actual: Tensor, expected: Tensor) -> None:
        """Takes in a part; NaN and infinities stay in all that follows."""
        expected = expected.double()
        difference = (actual.double() - expected).abs()
        # maximum and amax pass NaN on. The first part takes the totals to the device.
        self._largest = torch.maximum(self._largest.to(difference.device), difference.amax())
        self._squares = self._squares.to(difference.device) + difference.square().sum()
        self._norm = self._norm.to(difference.device) + expected.square().sum()

    @property
    def absolute(self) -> float:
        """Largest difference."""
        return float(self._largest)

    @property
    def relative(self) -> float:
        """Norm of the differences over the norm of what was expected."""
        return float(self._squares) ** 0.5 / max(float(self._norm) ** 0.5, 1e-300)


class Distances(NamedTuple):
    """Of one operation."""

    value: Distance
    grad_x: Distance
    """Of logits or hidden states."""
    grad_weight: Distance | None


def distances(pair: Pair, problem: Problem, truth_bytes: int) -> Distances:
    """Runs the operation once, and the plain version over all of its rows."""
    x = problem.x.detach().requires_grad_()
    weight = None if problem.weight is None else problem.weight.detach().requires_grad_()
    leaves = [x] if weight is None else [x, weight]
    output = pair.ours(x, weight, problem.tokens)
    upstream = _upstream(output)
    grads = torch.autograd.grad(output, leaves, upstream)
    return _compare(pair, problem, output.detach(), upstream, grads, truth_bytes)


def _compare(
    pair: Pair,
    problem: Problem,
    output: Tensor,
    upstream: Tensor,
    grads: tuple[Tensor, ...],
    truth_bytes: int,
) -> Distances:
    value, grad_x = Distance(), Distance()
    shared = None if problem.weight is None else problem.weight.double().requires_grad_()
    loss, total_grad = torch.zeros_like(output, dtype=torch.float64), None
    for rows in _chunks(problem, truth_bytes):
        leaf = problem.x[rows].double().requires_grad_()
        truth = pair.plain(leaf, shared, problem.tokens.of(rows))
        leaves = [leaf] if shared is None else [leaf, shared]
        part = upstream if output.dim() == 0 else upstream[..., rows]
        truth_grad, *shared_grad = torch.autograd.grad(truth, leaves, part.double())
        grad_x.add(grads[0][rows], truth_grad)
        if output.dim() == 0:
            loss += truth.detach()
        else:
            value.add(output[..., rows], truth.detach())
        if shared_grad:
            total_grad = shared_grad[0] if total_grad is None else total_grad.add_(shared_grad[0])
    if output.dim() == 0:
        value.add(output, loss)
    if total_grad is None:
        return Distances(value, grad_x, None)
    grad_weight = Distance()
    grad_weight.add(grads[1], total_grad)
    return Distances(value, grad_x, grad_weight)


def _upstream(output: Tensor) -> Tensor:
    # Not 1, so that a backward pass that forgets it shows.
    if output.dim() == 0:
        return torch.full_like(output, 2.0)
    generator = torch.Generator(output.device).manual_seed(0)
    return torch.randn(output.shape, generator=generator, device=output.device)


def _chunks(problem: Problem, truth_bytes: int) -> list[slice]:
    T = problem.x.shape[0]
    V = problem.x.shape[1] if problem.weight is None else problem.weight.shape[0]
    size = max(1, truth_bytes // (8 * V * _COPIES))
    return [slice(start, min(T, start + size)) for start in range(0, T, size)]
