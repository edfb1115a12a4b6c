"""Whether an engine samples from the student that is trained: asked of a few rollouts it gave.

An engine that answers from a stale prefix cache, a stale tied head, the weights of another run or
at another temperature gives text that looks right. Its log-probabilities give it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gad_fast.errors import EngineError
from gad_fast.models.batch import Item
from gad_fast.models.student import Student
from gad_fast.records import Group, Logprobs

NUM_GROUPS = 4
"""Groups of which a rollout is scored."""


class Gap(NamedTuple):
    """How far two log-probabilities of a token are apart, in nats, as an absolute value."""

    mean: float
    largest: float


# Three to a hundred times what roundings make of a model of 30 layers: 3e-6 and 2e-5 in float32,
# 4e-2 and 3e-1 in bfloat16. In float32 an update of 1e-5 a weight that is missed makes 6e-4.
_BOUNDS = {
    torch.float64: Gap(1e-6, 1e-4),
    torch.float32: Gap(3e-4, 1e-2),
    torch.bfloat16: Gap(1e-1, 2.0),
}


def probe(
    student: Student, groups: Sequence[Group], *, temperature: float, token_budget: int
) -> Gap | None:
    """Scores a rollout of each of a few groups as the trainer does, and compares.

    Args:
        student: as it was when the groups were sampled.
        groups: fresh from the engine.
        temperature: that of the rollouts.
        token_budget: tokens of a forward pass.

    Returns:
        The gap, or None when the engine gives no log-probabilities.

    Raises:
        EngineError: the gap is beyond what the precision explains.
    """
    groups = [group for group in groups[:NUM_GROUPS] if group.logprobs is not None]
    if not groups:
        return None
    ours = _scored(student, groups, temperature=temperature, token_budget=token_budget)
    theirs = [group.logprobs[0] for group in groups if group.logprobs is not None]
    gaps = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    gap = Gap(float(gaps.mean()), float(gaps.max()))
    bound = _bound(student)
    if not (gap.mean <= bound.mean and gap.largest <= bound.largest):
        at = int(gaps.argmax())
        raise EngineError(
            f"the engine does not sample from the student: its log-probabilities are "
            f"{gap.mean:.2e} nats off on average and {gap.largest:.2e} at most, where "
            f"{np.concatenate(theirs)[at]:.4f} by the engine is {np.concatenate(ours)[at]:.4f} by "
            f"the trainer (allowed: {bound.mean:.0e} and {bound.largest:.0e}; likely causes: "
            f"weights or a tied head that an update did not reach, a prefix cache kept over an "
            f"update, another temperature, another precision)"
        )
    return gap


def _scored(
    student: Student, groups: Sequence[Group], *, temperature: float, token_budget: int
) -> list[Logprobs]:
    items = [Item(group.prompt.prompt_ids, [group.rollouts[0]]) for group in groups]
    scored: dict[int, Logprobs] = {}
    with torch.no_grad():
        for indices, batch in student.micro_batches(items, token_budget=token_budget):
            logprobs = student.response_logprobs(batch, temperature=temperature)
            rows = logprobs.cpu().numpy().astype(np.float32)
            parts = np.split(rows, batch.lengths.cpu().numpy().cumsum()[:-1])
            scored |= dict(zip(indices, parts, strict=True))
    return [scored[index] for index in range(len(items))]


def _bound(student: Student) -> Gap:
    """That of the coarser of the two: the weights and the products."""
    dtypes = {student.model.dtype, student.precision.compute_dtype or student.model.dtype}
    return max(_BOUNDS[dtype] for dtype in dtypes if dtype in _BOUNDS)
