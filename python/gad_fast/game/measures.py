"""Figures of a step's groups that give shortcuts and degenerate text away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gad_fast.records import Group, Ids

NGRAM = 4


def length_correlation(scores: Tensor, groups: Sequence[Group]) -> float:
    """Pearson correlation of a rollout's score and its length within the groups, in [-1, 1].

    Only what differs within a group reaches the student; 0 when the lengths or scores do not.

    Args:
        scores: Float [B, G].
        groups: B groups of G rollouts.
    """
    lengths = torch.tensor([[len(r) for r in group.rollouts] for group in groups]).double()
    x = (lengths - lengths.mean(dim=1, keepdim=True)).flatten()
    y = (scores.double() - scores.double().mean(dim=1, keepdim=True)).flatten()
    norm = x.norm() * y.norm()
    return (x @ y / norm).item() if norm > 0 else 0.0


def repetition(groups: Sequence[Group]) -> float:
    """Share of 4-grams that their rollout has had before, the mean over rollouts, in [0, 1]."""
    shares = [_repeated(rollout.ids) for group in groups for rollout in group.rollouts]
    return sum(shares) / len(shares)


def _repeated(ids: Ids) -> float:
    tokens = ids.tolist()
    ngrams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
