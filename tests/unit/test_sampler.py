"""Random streams and the draw of a token, against exact probabilities."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gad_fast.errors import ConfigError
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.sampler import draw, inverse_cdf
from gad_fast.rollout.streams import stream_key, uniforms

# 0.1 % points of chi-square.
CRITICAL = {4: 18.47, 6: 22.46, 10: 29.59, 12: 32.91, 99: 148.2}


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Of the possible outcomes, with the degrees of freedom; an impossible one must not come."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0
    assert expected[p > 0].min() > 5
    terms = (counts - expected)[p > 0] ** 2 / expected[p > 0]
    return float(terms.sum()), int((p > 0).sum()) - 1


def numbers(count: int) -> np.ndarray:
    return uniforms(np.full(count, stream_key(3, 1, 4), dtype=np.uint64), np.arange(count))


def test_streams_are_uniform_and_do_not_overlap() -> None:
    drawn = np.concatenate(
        [
            uniforms(np.full(500, stream_key(seed, group, index), np.uint64), np.arange(500))
            for seed in (0, 1)
            for group in (0, 1, 7)
            for index in (0, 1)
        ]
    )
    assert len(np.unique(drawn)) == len(drawn) == 6000
    assert drawn.min() >= 0
    assert drawn.max() < 1
    statistic, degrees = chi_square(
        torch.bincount(torch.from_numpy((drawn * 100).astype(np.int64)), minlength=100).double(),
        torch.full((100,), 0.01, dtype=torch.float64),
    )
    assert statistic < CRITICAL[degrees]
    pairs = drawn.reshape(-1, 500)
    correlation = np.atleast_2d(np.corrcoef(np.concatenate([pairs[:, :-1], pairs[:, 1:]])))
    assert np.abs(correlation[np.triu_indices(24, 1)]).max() < 0.2  # 4.5 standard deviations


@pytest.mark.parametrize(
    ("cut", "kept"),
    [({}, 13), ({"top_k": 5}, 5), ({"top_p": 0.75}, None), ({"top_k": 7, "top_p": 0.999}, 7)],
)
def test_draws_follow_the_exact_probabilities(cut: dict[str, float], kept: int | None) -> None:
    torch.manual_seed(0)
    row, temperature = torch.randn(13, dtype=torch.float64), 0.7
    p = (row / temperature).softmax(-1)
    ordered, order = p.sort(descending=True)
    keeps = (ordered.cumsum(0) - ordered) < cut.get("top_p", 1.0)
    keeps[int(cut.get("top_k", 13)) :] = False
    p = torch.zeros_like(p).scatter(0, order, ordered * keeps)
    p /= p.sum()
    assert kept is None or int((p > 0).sum()) == kept
    sampling = Sampling(temperature, 1, **cut)  # pyright: ignore[reportArgumentType]
    tokens, logprobs = draw(row.float().expand(20000, -1), sampling, numbers(20000))
    statistic, degrees = chi_square(torch.bincount(tokens, minlength=13).double(), p)
    assert statistic < CRITICAL.get(degrees, 32.91)
    assert_close(logprobs.double(), p[tokens].log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [257, 384, 1000])
def test_the_inverse_cdf_equals_a_running_sum_in_64_bits(size: int) -> None:
    torch.manual_seed(size)
    p = (4 * torch.randn(500, size)).softmax(-1)
    u = torch.rand(500, dtype=torch.float64)
    sums = p.double().cumsum(-1)
    expected = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0]
    tokens, logprobs = inverse_cdf(p, u)
    assert (tokens == expected).float().mean() > 0.998  # block sums are rounded once more
    assert_close(logprobs, p.gather(1, tokens[:, None])[:, 0].log(), atol=1e-5, rtol=0)


def test_a_token_without_probability_is_never_drawn() -> None:
    """Not at either end, nor where u falls exactly between two tokens."""
    p = torch.zeros(4, 600)
    p[:, 100], p[:, 300] = 0.5, 0.5
    u = torch.tensor([0.0, 0.5, 0.4999999, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(p, u)[0].tolist() == [100, 300, 100, 300]


def test_temperature_zero_takes_the_likeliest_with_the_models_own_logprob() -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 40)
    tokens, logprobs = draw(logits, Sampling(0.0, 1), np.zeros(5))
    assert torch.equal(tokens, logits.argmax(-1))
    assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, 5), "temperature must be 0 or more, got -0.1"),
        ((float("nan"), 5), "temperature must be 0 or more, got nan"),
        ((1.0, 0), "max_tokens must be at least 1, got 0"),
        ((1.0, 5, -1), "top_k must be 0 or more, got -1"),
        ((1.0, 5, 0, 0.0), "top_p must be over 0 and at most 1, got 0.0"),
        ((1.0, 5, 0, 1.0, ("",)), "a stop string must not be empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings: tuple[float, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(*settings)
