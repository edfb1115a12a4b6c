"""Rollouts to tensors: the Rust buffer against Python lists, about two million tokens.

Question: what does a token cost on its way from the engine to the forward pass? One step in both:
append the rollouts of every group, group advantages, best-fit decreasing under a token budget, and
for each bin the tensors of ids, position ids, response mask, log-probabilities and advantages.

The peer keeps what TRL and prime-rl keep: a list of ints or floats a stream and sample, extended
bin by bin, handed to torch at the end. Each side starts from what its engine gives: arrays here,
lists there. "from lists" is this side with an engine that gives lists. All run in turns in
this process, and must give the same tensors.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gad_fast import _core
from gad_fast.bench.plain_packing import pack_in_python
from gad_fast.bench.report import Comparison, Report
from gad_fast.bench.timing import seconds

GROUP_SIZE = 8
TOKEN_BUDGET = 16_384
EPS = 1e-6
GOAL = 30.0
SEED = 0

Bin = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Ids, position ids, response mask, log-probabilities, advantages."""


@dataclass
class Sample:
    """One rollout as an engine gives it: arrays or lists."""

    group_id: int
    prompt_ids: Any
    response_ids: Any
    logprobs: Any
    score: float

    def as_lists(self) -> Sample:
        """The same with Python's numbers."""
        return Sample(
            self.group_id,
            self.prompt_ids.tolist(),
            self.response_ids.tolist(),
            self.logprobs.tolist(),
            self.score,
        )


def run(*, quick: bool) -> Report:
    """One step's rollouts with all sides in turns; fails unless the tensors agree."""
    num_groups, repeats = (8, 1) if quick else (256, 7)
    arrays = samples(num_groups)
    lists = [sample.as_lists() for sample in arrays]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = with_lists(lists)
        check_equal(with_buffer(arrays), expected)  # also the warm-up
        check_equal(with_buffer_from_lists(lists), expected)
        num_tokens = sum(len(ids) for ids, *_ in expected)
        del expected
        turns = compare(arrays, lists, repeats)
    finally:
        torch.set_num_threads(num_threads)
    return Report(
        name="buffer",
        is_quick=quick,
        question="What does a token cost from engine to tensor, against Python lists?",
        settings={
            "num_tokens": num_tokens,
            "num_rollouts": len(arrays),
            "group_size": GROUP_SIZE,
            "token_budget": TOKEN_BUDGET,
            "seed": SEED,
            "num_threads": 1,
        },
        comparisons=[_comparison(turns, given, num_tokens) for given in ("arrays", "lists")],
        samples=turns,
    )


def samples(num_groups: int) -> list[Sample]:
    """About a thousand tokens each, lognormal; the rollouts of a group one after the other."""
    rng = np.random.default_rng(SEED)
    made: list[Sample] = []
    for group_id in range(num_groups):
        prompt_ids = rng.integers(150_000, size=rng.integers(50, 300), dtype=np.int32)
        for length in np.clip(rng.lognormal(6.3, 0.9, GROUP_SIZE), 16, 8192).astype(int):
            response_ids = rng.integers(150_000, size=length, dtype=np.int32)
            logprobs = -rng.exponential(size=length).astype(np.float32)
            score = float(np.float32(rng.normal()))
            made.append(Sample(group_id, prompt_ids, response_ids, logprobs, score))
    return made


def with_buffer(given: list[Sample]) -> list[Bin]:
    """The step with the Rust core, from arrays."""
    buffer = _core.RolloutBuffer(GROUP_SIZE)
    for sample in given:
        buffer.push(
            sample.group_id,
            sample.prompt_ids,
            sample.response_ids,
            finish_reason=_core.FINISH_STOP,
            weight_version=0,
            logprobs=sample.logprobs,
        )
    batch = buffer.take(len(given) // GROUP_SIZE, current_version=0, timeout=0.0)
    assert batch is not None, len(given)
    scored = batch.with_scores(np.array([sample.score for sample in given], dtype=np.float32))
    advantages = scored.advantages(eps=EPS)
    indices, offsets = _core.pack_sequences(np.diff(scored.offsets), token_budget=TOKEN_BUDGET)
    bins = np.split(indices, offsets[1:-1])
    return [_gather(scored, advantages, bin_indices) for bin_indices in bins]


def _gather(
    batch: _core.RolloutBatch, advantages: NDArray[np.float32], indices: NDArray[np.int64]
) -> Bin:
    tokens, position_ids, response_mask, _ = batch.gather(indices)
    return (
        torch.from_numpy(tokens),
        torch.from_numpy(position_ids),
        torch.from_numpy(response_mask),
        torch.from_numpy(batch.gather_stream("logprobs", indices)),
        torch.from_numpy(batch.spread(advantages, indices)),
    )


def with_buffer_from_lists(given: list[Sample]) -> list[Bin]:
    """The step with the Rust core, from lists."""
    arrays = [
        Sample(
            sample.group_id,
            np.array(sample.prompt_ids, dtype=np.int32),
            np.array(sample.response_ids, dtype=np.int32),
            np.array(sample.logprobs, dtype=np.float32),
            sample.score,
        )
        for sample in given
    ]
    return with_buffer(arrays)


def with_lists(given: list[Sample]) -> list[Bin]:
    """The step with lists, as TRL and prime-rl do it."""
    groups: dict[int, list[Sample]] = {}
    for sample in given:
        groups.setdefault(sample.group_id, []).append(sample)
    rows = [sample for group in groups.values() for sample in group]
    rewards = torch.tensor([row.score for row in rows]).view(-1, GROUP_SIZE)
    std = rewards.std(dim=1, keepdim=True)
    advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (std + EPS)).view(-1).tolist()
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    bins = pack_in_python(lengths, TOKEN_BUDGET)
    return [_extend([rows[i] for i in bin_], [advantages[i] for i in bin_]) for bin_ in bins]


def _extend(rows: list[Sample], advantages: list[float]) -> Bin:
    input_ids: list[int] = []
    position_ids: list[int] = []
    loss_mask: list[bool] = []
    logprobs: list[float] = []
    token_advantages: list[float] = []
    for row, advantage in zip(rows, advantages, strict=True):
        num_prompt, num_response = len(row.prompt_ids), len(row.response_ids)
        input_ids.extend(row.prompt_ids + row.response_ids)
        position_ids.extend(range(num_prompt + num_response))
        loss_mask.extend([False] * num_prompt + [True] * num_response)
        logprobs.extend([0.0] * num_prompt + row.logprobs)
        token_advantages.extend([0.0] * num_prompt + [advantage] * num_response)
    return (
        torch.tensor(input_ids, dtype=torch.long),
        torch.tensor(position_ids, dtype=torch.long),
        torch.tensor(loss_mask, dtype=torch.bool),
        torch.tensor(logprobs, dtype=torch.float32),
        torch.tensor(token_advantages, dtype=torch.float32),
    )


def check_equal(found: list[Bin], expected: list[Bin]) -> None:
    """Fails unless both have the same bins with the same numbers."""
    assert len(found) == len(expected), (len(found), len(expected))
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert torch.equal(a.to(b.dtype), b)
        # The peer's means and deviations are in 32 bits.
        torch.testing.assert_close(ours[4], theirs[4], rtol=1e-4, atol=1e-5)


def compare(arrays: list[Sample], lists: list[Sample], repeats: int) -> list[dict[str, float]]:
    """The seconds of all three, turn by turn."""
    return [
        {
            "arrays": seconds(lambda: with_buffer(arrays)),
            "lists": seconds(lambda: with_buffer_from_lists(lists)),
            "peer": seconds(lambda: with_lists(lists)),
        }
        for _ in range(repeats)
    ]


def _comparison(turns: list[dict[str, float]], given: str, num_tokens: int) -> Comparison:
    nanoseconds = statistics.median(turn[given] for turn in turns) / num_tokens * 1e9
    return Comparison(
        case=f"from {given}, {nanoseconds:.2f} ns a token",
        peer="Python lists",
        ratios=[turn["peer"] / turn[given] for turn in turns],
        goal=GOAL if given == "arrays" else None,
    )
