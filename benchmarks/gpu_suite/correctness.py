"""Every operation against float64, values and gradients, at shapes of real models.

Tolerances: log-probabilities and losses are computed in float32, whatever the dtype of the logits,
and a sum over the vocabulary is good to 2e-5; an entropy to 1e-4. Gradients are stored in the dtype
of the inputs: bfloat16 rounds by up to 2^-8, which is 1.6e-3 of the norm for each of two roundings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from gpu_suite.cases import Case, Results, Row
from gpu_suite.data import make_problem
from gpu_suite.operations import ON_HEADS, ON_LOGITS, Pair
from gpu_suite.scale import Scale, Shape, head_shapes, logit_shapes
from gpu_suite.small_operations import small_problems
from gpu_suite.truth import Distance, distances

VALUE_LIMIT = 2e-5
ENTROPY_LIMIT = 1e-4
GRADIENT_LIMITS = {"float32": 1e-5, "bfloat16": 4e-3}


def cases(scale: Scale, results: Results) -> list[Case]:
    """Small operations first, then by tokens, so that what no time is left for is the largest."""
    del results
    small = [
        Case(name, functools.partial(_check_small, name, scale)) for name in small_problems(scale)
    ]
    shapes = sorted(
        [*logit_shapes(scale), *head_shapes(scale)], key=lambda s: scale.num_tokens.index(s.T)
    )
    large = [
        case
        for shape, dtype in [
            (scale.float32_shape, "float32"),
            *((shape, scale.dtype) for shape in shapes),
        ]
        for case in _cases_at(shape, dtype, scale)
    ]
    return [*small, *large]


def _cases_at(shape: Shape, dtype: str, scale: Scale) -> list[Case]:
    return [
        Case(f"{name} {shape} {dtype}", functools.partial(_check, name, pair, shape, dtype, scale))
        for name, pair in (ON_LOGITS if shape.D is None else ON_HEADS).items()
    ]


def _check(name: str, pair: Pair, shape: Shape, dtype: str, scale: Scale) -> list[Row]:
    problem = make_problem(shape, scale, dtype, is_masked=True)
    found = distances(pair, problem, scale.truth_bytes)
    limit = ENTROPY_LIMIT if "entropy" in name else VALUE_LIMIT
    rows = [_row("value", "absolute", found.value.absolute, limit)]
    grads = {"grad x": found.grad_x, "grad weight": found.grad_weight}
    rows += [
        _row(quantity, "relative", distance.relative, GRADIENT_LIMITS[dtype])
        for quantity, distance in grads.items()
        if distance is not None
    ]
    return [{"op": name, "shape": str(shape), "dtype": dtype, **row} for row in rows]


def _check_small(name: str, scale: Scale) -> list[Row]:
    problem = small_problems(scale)[name]()
    is_differentiable = name != "group_advantages"  # a constant to autograd
    actual = _value_and_grads(problem.ours, problem.leaves, is_differentiable)
    doubles = tuple(leaf.double() for leaf in problem.leaves)
    expected = _value_and_grads(problem.plain, doubles, is_differentiable)
    rows: list[Row] = []
    for index, (mine, truth) in enumerate(zip(actual, expected, strict=True)):
        distance = Distance()
        distance.add(mine, truth)
        quantity = f"grad {index}" if index else "value"
        limit = GRADIENT_LIMITS["bfloat16" if mine.dtype == torch.bfloat16 else "float32"]
        rows.append({"op": name, **_row(quantity, "relative", distance.relative, limit)})
    return rows


def _value_and_grads(
    run: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...], is_differentiable: bool
) -> list[torch.Tensor]:
    leaves = tuple(leaf.detach().requires_grad_(is_differentiable) for leaf in leaves)
    output = run(*leaves)
    if not is_differentiable:
        return [output]
    upstream = torch.linspace(0.5, 2.0, output.numel(), device=output.device)
    upstream = upstream.to(output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def _row(quantity: str, measure: str, error: float, limit: float) -> Row:
    # Written so that NaN fails.
    return {
        "quantity": quantity,
        "measure": measure,
        "error": error,
        "limit": limit,
        "passes": error <= limit,
    }
