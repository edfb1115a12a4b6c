"""Figures of groups against NumPy and by hand."""

import numpy as np
import pytest
import torch

from gad_fast.game.measures import length_correlation, repetition
from gad_fast.records import EncodedExample, Example, Group, Response

PROMPT = EncodedExample(Example([], ""), np.array([1], np.int32), Response(np.array([2]), True))


def group(*texts: list[int]) -> Group:
    return Group(PROMPT, [Response(np.array(t, dtype=np.int32), True) for t in texts])


def test_length_correlation_is_that_within_the_groups() -> None:
    """Between the groups longer is far better, within them shorter is: only that counts."""
    lengths = np.array([[1, 4, 2], [20, 23, 29]])
    scores = np.array([[0.3, -0.2, 0.25], [50.0, 49.9, 49.0]])
    groups = [group(*([0] * n for n in row)) for row in lengths]
    x = (lengths - lengths.mean(axis=1, keepdims=True)).ravel()
    y = (scores - scores.mean(axis=1, keepdims=True)).ravel()
    expected = np.corrcoef(x, y)[0, 1]
    assert expected < -0.8
    assert length_correlation(torch.tensor(scores), groups) == pytest.approx(expected, abs=1e-12)


def test_length_correlation_of_equal_lengths_or_scores_is_0() -> None:
    assert length_correlation(torch.tensor([[1.0, 2.0]]), [group([1], [2])]) == 0.0
    assert length_correlation(torch.tensor([[1.0, 1.0]]), [group([1], [2, 2])]) == 0.0


def test_repetition_counts_4_grams_that_were_there_before() -> None:
    assert repetition([group([1, 2, 3])]) == 0.0
    assert repetition([group([1, 2, 3, 4, 5, 6, 7])]) == 0.0
    # 1111 eight times over, seven of them again.
    assert repetition([group([1] * 11)]) == pytest.approx(7 / 8)
    assert repetition([group([1] * 11, [1, 2, 3, 4, 5])]) == pytest.approx(7 / 16)
