"""Decode steps that are recorded and replayed, on a CPU: a tape in the place of CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines import CPU, llama, make, requests, tokens
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.static import engine, graphs
from gad_fast.rollout.static.engine import StaticEngine
from gad_fast.rollout.static.graphs import Graphs, Size, cuda_recorder

SAMPLED = Sampling(0.9, 9)


class Tape(TorchDispatchMode):
    """What a graph is: kernels, and the places that they read and write; no Python runs again."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.num_replays = 0
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, result in self.calls:
            for place, value in zip(
                tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(place, torch.Tensor) and place is not value:
                    place.copy_(value)


def record_with(monkeypatch: pytest.MonkeyPatch, *, fails_at: int | None = None) -> list[Tape]:
    """Lets engines record on tapes; the recording of that number fails."""
    tapes: list[Tape] = []

    def record(run: Callable[[], None]) -> Callable[[], None]:
        if len(tapes) == fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nat one place")
        tapes.append(Tape(run))
        return tapes[-1].replay

    monkeypatch.setattr(engine, "cuda_recorder", lambda _device: record)
    monkeypatch.setattr(graphs, "WIDTH", 4)
    return tapes


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_replayed_steps_sample_the_same_tokens(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Rows beyond the active ones, and columns beyond the longest, change nothing."""
    model = llama()
    static = make(StaticEngine, model, rows)
    wanted = requests(5, SAMPLED)
    expected = {(o.group_id, o.rollout_index): o for o in static.generate(wanted)}
    tapes = record_with(monkeypatch)
    for output in static.generate(wanted):
        eager = expected.pop((output.group_id, output.rollout_index))
        assert output.response.ids.tolist() == eager.response.ids.tolist()
        assert output.logprobs is not None
        assert_close(output.logprobs, eager.logprobs, atol=1e-5, rtol=0)
    assert not expected
    assert 2 <= len(tapes) <= 4 * rows.bit_length()
    assert sum(tape.num_replays for tape in tapes) >= 3 * len(tapes)


def test_a_prompt_kept_in_a_free_row_is_whole_when_it_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding rows write as well: never where a prompt is, whatever enters the row next."""
    wanted = requests(80, Sampling(1.0, 9), [[1, 2, 7, 8, 9, 10, 3]])
    static = make(StaticEngine, llama(initializer_range=0.1), 16)
    expected = tokens(static.generate(wanted))
    assert {len(ids) for ids in expected.values()} == set(range(1, 10))
    record_with(monkeypatch)
    assert tokens(static.generate(wanted)) == expected


def test_an_update_is_seen_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, changed = llama(), llama(seed=5)
    record_with(monkeypatch)
    static = make(StaticEngine, model, 3)
    before = tokens(static.generate(requests(3, SAMPLED)))
    model.load_state_dict(changed.state_dict())
    after = tokens(static.generate(requests(3, SAMPLED)))
    monkeypatch.undo()
    assert after == tokens(make(StaticEngine, changed, 3).generate(requests(3, SAMPLED)))
    assert after != before


@pytest.mark.parametrize("fails_at", [0, 2])
def test_where_recording_fails_steps_run_as_they_are_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    static = make(StaticEngine, llama(), 7)
    expected = tokens(static.generate(requests(5, SAMPLED)))
    tapes = record_with(monkeypatch, fails_at=fails_at)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted") as told:
        assert tokens(static.generate(requests(5, SAMPLED))) == expected
    assert len(told) == 1
    assert "at one place" not in str(told[0].message)
    assert len(tapes) == fails_at


def test_sizes_are_halves_of_the_rows_and_multiples_of_columns() -> None:
    largest = Size(24, 150)
    recorded = Graphs(lambda run: run, largest, lambda size: torch.zeros(size.rows, 1))
    for rows, width, expected in (
        (24, 150, (24, 150)),
        (13, 129, (24, 150)),
        (12, 128, (12, 128)),
        (7, 65, (12, 128)),
        (3, 64, (3, 64)),
        (1, 1, (1, 64)),
    ):
        assert recorded.size(rows, width) == expected
    eager = Graphs(None, largest, lambda size: torch.zeros(size.rows, 1))
    assert eager.size(7, 65) == (7, 65)


def test_a_cpu_never_records() -> None:
    assert cuda_recorder(CPU.device) is None
