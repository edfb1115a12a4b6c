"""Every kernel's time against its floor, and the memory it needs.

The floor is what the ceilings of this run allow: bytes of logits read and written once, or the
arithmetic of G = 2 T H V for each product of the head. Goals are ratios to it. Small operations are
bound by their launches and have no floor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpu_suite.cases import Case, Results, Row, rows_of
from gpu_suite.ceilings import Ceilings, ceilings_of
from gpu_suite.data import make_problem
from gpu_suite.operations import ON_HEADS, ON_LOGITS, Operation
from gpu_suite.scale import Scale, Shape
from gpu_suite.small_operations import small_problems
from gpu_suite.timing import measure

Pass = Literal["forward", "backward", "both"]


class Target(NamedTuple):
    """Some of an operation's work, what it cannot do without, and how close it should come."""

    op: str
    part: Pass
    passes: float
    """Over the logits, reading or writing; or matrix products of the head."""
    goal: float | None
    is_frozen: bool = False
    """Whether the head's weight needs no gradient."""

    def __str__(self) -> str:
        return f"{self.op} {self.part}{' frozen' if self.is_frozen else ''}"


ON_LOGITS_TARGETS = (
    Target("token_logprobs", "forward", 1, 1.15),
    Target("token_logprobs+entropy", "forward", 1, 1.15),
    Target("token_logprobs", "backward", 2, 1.20),
    Target("token_logprobs+entropy", "backward", 2, 1.20),
    Target("entropy_from_logits", "forward", 1, 1.15),
    Target("policy_loss_from_logits", "both", 2, 1.70),
)
ON_HEADS_TARGETS = (
    Target("linear_token_logprobs", "forward", 1, 1.35),
    Target("linear_token_logprobs+entropy", "forward", 1, 1.35),
    Target("linear_token_logprobs", "backward", 3, 1.35),
    Target("linear_policy_loss", "both", 3, 1.30),
    Target("linear_policy_loss", "both", 2, 1.35, is_frozen=True),
)
# At small widths the softmax weighs more against the product.
_NARROW, _NARROW_FORWARD_GOAL = 3072, 1.5


def cases(scale: Scale, results: Results) -> list[Case]:
    """Every target at every timed shape, then the small operations."""
    shapes = [(s, ON_LOGITS_TARGETS) for s in scale.timed_logits]
    shapes += [(s, ON_HEADS_TARGETS) for s in scale.timed_heads]
    timed = [
        Case(f"{target} {shape}", functools.partial(_time, target, shape, scale, results))
        for shape, targets in shapes
        for target in targets
    ]
    small = [
        Case(name, functools.partial(_time_small, name, scale)) for name in small_problems(scale)
    ]
    return [*timed, *small]


def prepared(
    operation: Operation, target: Target, shape: Shape, scale: Scale
) -> Callable[[], object]:
    """A call that does the target's part of the work, with its inputs on the device."""
    x, weight, tokens = make_problem(shape, scale, scale.dtype, is_masked=False)
    x.requires_grad_(target.part != "forward")
    leaves = [x]
    if weight is not None and not target.is_frozen:
        leaves.append(weight.requires_grad_(target.part != "forward"))
    return passes_of(lambda: operation(x, weight, tokens), leaves, target.part)


def passes_of(run: Callable[[], Tensor], leaves: list[Tensor], part: Pass) -> Callable[[], object]:
    """The forward pass of `run`, its backward pass alone, or both."""
    if part == "forward":
        return run
    if part == "both":
        return lambda: torch.autograd.grad(_total(run()), leaves)
    total = _total(run())
    return lambda: torch.autograd.grad(total, leaves, retain_graph=True)


def floor_ms(target: Target, shape: Shape, scale: Scale, ceilings: Ceilings) -> float:
    """What the device needs for the target at the least."""
    if shape.D is not None:
        return ceilings.milliseconds(flop=target.passes * 2 * shape.T * shape.V * shape.D)
    itemsize = getattr(torch, scale.dtype).itemsize
    return ceilings.milliseconds(num_bytes=target.passes * shape.T * shape.V * itemsize)


def goal_of(target: Target, shape: Shape) -> float | None:
    """The goal at a shape."""
    is_narrow = shape.D is not None and shape.D < _NARROW
    return _NARROW_FORWARD_GOAL if is_narrow and target.part == "forward" else target.goal


def _time(target: Target, shape: Shape, scale: Scale, results: Results) -> list[Row]:
    pairs = ON_LOGITS if shape.D is None else ON_HEADS
    found = measure(prepared(pairs[target.op].ours, target, shape, scale), scale)
    ceilings = ceilings_of(results)
    floor, goal = floor_ms(target, shape, scale, ceilings), goal_of(target, shape)
    return [
        {
            "op": target.op,
            "part": target.part,
            "is_frozen": target.is_frozen,
            "shape": str(shape),
            "ms": found.milliseconds,
            "spread": found.spread,
            "floor_ms": floor,
            "is_floor_measured": ceilings.is_measured,
            "ratio": found.milliseconds / floor,
            "goal": goal,
            "meets_goal": None if goal is None else found.milliseconds <= goal * floor,
            "products_ms": _products_ms(target, shape, results),
            "peak_gib": found.peak_gib,
            "gradients_gib": _gradients_gib(target, shape, scale),
        }
    ]


def _products_ms(target: Target, shape: Shape, results: Results) -> float | None:
    """The same products by cuBLAS, at this width: a nearer limit than the square's rate."""
    rates = [
        row["tflop_per_second"]
        for row in rows_of(results, "ceilings")
        if shape.D is not None and row.get("D") == shape.D
    ]
    if not rates or shape.D is None:
        return None
    rate = len(rates) / sum(1 / rate for rate in rates)
    return target.passes * 2 * shape.T * shape.V * shape.D / rate / 1e9


def _gradients_gib(target: Target, shape: Shape, scale: Scale) -> float:
    """What of the peak is the result itself."""
    if target.part == "forward":
        return 0.0
    T, V, D = shape
    num_elements = T * V if D is None else T * D + (0 if target.is_frozen else V * D)
    return num_elements * getattr(torch, scale.dtype).itemsize / 2**30


def _time_small(name: str, scale: Scale) -> list[Row]:
    problem = small_problems(scale)[name]()
    leaves = list(problem.leaves)
    part: Pass = "forward" if name == "group_advantages" else "both"
    for leaf in leaves:
        leaf.requires_grad_(part == "both")
    rows: list[Row] = []
    for who, run in (("gad-fast", problem.ours), ("plain torch", problem.plain)):
        call = passes_of(functools.partial(run, *leaves), leaves, part)
        found = measure(call, scale)
        rows.append(
            {"op": name, "part": part, "by": who, "ms": found.milliseconds, "spread": found.spread}
        )
    return rows


def _total(output: Tensor) -> Tensor:
    """A loss of numbers for each token; its own cost is that of a few bytes a token."""
    return output if output.dim() == 0 else output.sum()
