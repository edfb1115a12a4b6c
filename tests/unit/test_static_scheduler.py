"""Rows, rollouts and where each is: without a model."""

import numpy as np

from engines import END, requests
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.static.scheduler import Finished, Rollout, Scheduler

MAX_TOKENS = 6


def play(num_prompts: int, n: int, num_rows: int, seed: int) -> tuple[list[Finished], list[int]]:
    """Samples random tokens; a cache of marks follows what the scheduler says about rows.

    Row r of `cache` holds, for each token that was read there, the rollout that read it; tokens of
    the prompt are marked with its number alone.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 5, size=num_prompts)
    prompts = [random.integers(16, size=length).tolist() for length in lengths]
    wanted = requests(n, Sampling(1.0, MAX_TOKENS), prompts)
    waiting = [Rollout(request, index, None) for request in wanted for index in range(n)]
    scheduler = Scheduler(waiting, num_rows=num_rows, max_tokens=MAX_TOKENS, end_id=END)
    cache: list[list[object]] = [[] for _ in range(num_rows)]
    active: list[Rollout] = []
    finished, computed = list[Finished](), list[int]()
    while True:
        entries = scheduler.enter()
        was_active = {rollout.request.group_id for rollout in active}
        for entry in sorted(entries, key=lambda entry: entry.source is not None):
            # All prompts are computed before any is copied, as the decoder does it.
            group = entry.rollout.request.group_id
            prefix = [group] * entry.rollout.num_prefix
            if entry.source is None:
                assert group not in was_active
                computed.append(group)
            else:
                assert cache[entry.source][: len(prefix)] == prefix
            cache[entry.row] = [*prefix]
        assert [entry.row - len(active) for entry in entries] == list(range(len(entries)))
        active += [entry.rollout for entry in entries]
        if not scheduler.num_active:
            return finished, computed
        assert scheduler.num_active == len(active) <= num_rows
        for row, rollout in enumerate(active):
            assert len(cache[row]) == scheduler.reads[1][row]
            assert cache[row][rollout.num_prefix :] == [rollout] * scheduler.draws[1][row]
            cache[row].append(rollout)
        drawn = random.integers(END + 1, size=len(active))
        for left in scheduler.record(drawn, drawn.astype(np.float32)):
            assert (left.last_row, left.rollout) == (len(active) - 1, active[left.row])
            cache[left.row] = cache[left.last_row][: left.num_cached]
            active[left.row] = active[-1]
            active.pop()
            finished.append(left)


def test_every_rollout_is_sampled_once_in_a_row_of_its_own() -> None:
    for seed, (num_prompts, n, num_rows) in enumerate(
        [(1, 1, 1), (5, 3, 2), (7, 4, 9), (3, 5, 64)]
    ):
        finished, _ = play(num_prompts, n, min(num_rows, num_prompts * n), seed)
        found = {(left.rollout.request.group_id, left.rollout.number) for left in finished}
        assert found == {(group, index) for group in range(num_prompts) for index in range(n)}
        assert len(finished) == num_prompts * n
        for left in finished:
            ids = left.ids.tolist()
            assert ids.index(END) == len(ids) - 1 if END in ids else len(ids) == MAX_TOKENS
            assert left.logprobs.tolist() == ids


def test_prompts_are_seldom_computed_twice() -> None:
    """Never while a rollout of theirs is in, which `play` asserts."""
    num_computed = 0
    for seed in range(40):
        _, computed = play(num_prompts=6, n=4, num_rows=3, seed=seed)
        assert set(computed) == set(range(6))
        num_computed += len(computed)
        _, computed = play(num_prompts=6, n=4, num_rows=24, seed=seed)
        assert sorted(computed) == list(range(6))
    assert 240 <= num_computed < 300  # of 960 rollouts, in rows that are almost always too few


def test_rows_are_given_in_blocks_of_an_eighth() -> None:
    (request,) = requests(40, Sampling(1.0, 3), [[5, 6]])
    rollouts = [Rollout(request, index, None) for index in range(40)]
    scheduler = Scheduler(rollouts, num_rows=16, max_tokens=3, end_id=END)
    assert len(scheduler.enter()) == 16
    for num_ends, num_entered in ((1, 0), (1, 2)):
        drawn = np.array([END] * num_ends + [0] * (scheduler.num_active - num_ends))
        assert len(scheduler.record(drawn, drawn.astype(np.float32))) == num_ends
        assert len(scheduler.enter()) == num_entered
