"""Runs every operation once, both ways, on small ragged shapes: what the sanitizer watches.

Takes the name of a scale, and needs `benchmarks` on the module path.
"""

from __future__ import annotations

import sys

import torch

from gpu_suite.data import make_problem
from gpu_suite.operations import ON_HEADS, ON_LOGITS
from gpu_suite.scale import SCALES, SMOKE, Scale, Shape
from gpu_suite.small_operations import small_problems
from gpu_suite.timing import synchronize

# Neither is a multiple of a block in any direction; a width must be one of 8.
_LOGITS, _HEAD = Shape(37, 1003), Shape(77, 517, 72)


def run_all(scale: Scale) -> list[str]:
    """Names of the operations that ran."""
    ran: list[str] = []
    for shape, pairs in ((_LOGITS, ON_LOGITS), (_HEAD, ON_HEADS)):
        for name, pair in pairs.items():
            x, weight, tokens = make_problem(shape, scale, scale.dtype, is_masked=True)
            leaves = [x] if weight is None else [x, weight]
            for leaf in leaves:
                leaf.requires_grad_()
            torch.autograd.grad(pair.ours(x, weight, tokens).sum(), leaves)
            ran.append(name)
    for name, make in small_problems(scale).items():
        leaves, ours, _ = make()
        is_differentiable = name != "group_advantages"
        output = ours(*(leaf.requires_grad_(is_differentiable) for leaf in leaves))
        if is_differentiable:
            torch.autograd.grad(output.sum(), leaves)
        ran.append(name)
    synchronize(scale.device)
    return ran


def small(scale: Scale) -> Scale:
    """The scale's device and dtype with the sizes of the smoke run: a sanitizer is slow."""
    return SMOKE.on(scale.device, scale.dtype)


if __name__ == "__main__":
    run_all(small(SCALES[sys.argv[1]]))
