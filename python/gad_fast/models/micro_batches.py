"""Token-budgeted micro-batches: which sequences go through a model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gad_fast import _core
from gad_fast.models.batch import PaddedBatch, pad
from gad_fast.records import Group, Ids, Response


def micro_batches(
    rows: Sequence[tuple[Ids, Response]], *, token_budget: int, device: torch.device
) -> Iterator[tuple[list[int], PaddedBatch]]:
    """Padded batches of (prompt, response) rows, each with the indices of its rows.

    Args:
        rows: sequences, in any order.
        token_budget: most padded tokens a batch may hold; a longer row is a batch of its own.
        device: where the batches are put.
    """
    plan = _core.plan_micro_batches(
        np.ones(len(rows), dtype=np.int64),
        np.array([len(prompt) for prompt, _ in rows], dtype=np.int64),
        np.array([len(response) for _, response in rows], dtype=np.int64),
        token_budget=token_budget,
    )
    for indices in (part.tolist() for part in plan):
        prompts, responses = zip(*(rows[i] for i in indices), strict=True)
        # Padding is masked: any token will do.
        yield indices, pad(prompts, responses, pad_id=0, device=device)


def plan_groups(groups: Sequence[Group], *, token_budget: int) -> Iterator[list[int]]:
    """Indices of the groups of each micro-batch; a group, teacher included, is never torn apart.

    Lengths are in the student's tokens, also where the discriminator has its own.
    """
    longest = [max(len(r) for r in [*g.rollouts, g.prompt.teacher]) for g in groups]
    plan = _core.plan_micro_batches(
        np.array([len(group.rollouts) + 1 for group in groups], dtype=np.int64),
        np.array([len(group.prompt.prompt_ids) for group in groups], dtype=np.int64),
        np.array(longest, dtype=np.int64),
        token_budget=token_budget,
    )
    return (part.tolist() for part in plan)
