"""The rollout buffer loses nothing, gives out whole fresh groups, and shares what it gives out."""

import gc
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import tiny
from gad_fast import _core
from gad_fast.kernels import group_advantages
from gad_fast.text import TextCodec

Ids = NDArray[np.int32]


def ids(*values: int) -> Ids:
    return np.array(values, dtype=np.int32)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def push(
    buffer: _core.RolloutBuffer,
    group_id: int,
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    version: int = 0,
    reason: int = _core.FINISH_STOP,
) -> None:
    """A rollout with log-probabilities that tell which token they belong to."""
    buffer.push(
        group_id,
        prompt_ids,
        response_ids,
        finish_reason=reason,
        weight_version=version,
        logprobs=-response_ids.astype(np.float32),
    )


def take(buffer: _core.RolloutBuffer, num_groups: int, version: int = 0) -> _core.RolloutBatch:
    batch = buffer.take(num_groups, current_version=version, timeout=0.0)
    assert batch is not None
    return batch


def small_batch() -> _core.RolloutBatch:
    """Two groups of two."""
    buffer = _core.RolloutBuffer(2)
    push(buffer, 7, ids(1, 2), ids(3), version=1)
    push(buffer, 8, ids(5), ids(6, 7), version=2)
    push(buffer, 8, ids(5), ids(8), version=3, reason=_core.FINISH_LENGTH)
    push(buffer, 7, ids(1, 2), ids(4, 4), version=4)
    return take(buffer, 2)


def test_rows_lie_end_to_end_in_the_order_in_which_groups_became_ready() -> None:
    batch = small_batch()
    assert (len(batch), batch.num_groups, batch.group_size) == (4, 2, 2)
    assert batch.streams == ("logprobs",)
    expected = {
        "tokens": ids(5, 6, 7, 5, 8, 1, 2, 3, 1, 2, 4, 4),
        "offsets": np.array([0, 3, 5, 8, 12]),
        "prompt_lengths": np.array([1, 1, 2, 2]),
        "response_offsets": np.array([0, 2, 3, 4, 6]),
        "group_ids": np.array([8, 8, 7, 7]),
        "finish_reasons": np.array([0, 1, 0, 0], dtype=np.uint8),
        "weight_versions": np.array([2, 3, 1, 4]),
        "teacher_tokens": ids(),
        "teacher_offsets": np.array([0, 0, 0]),
    }
    for name, values in expected.items():
        column = getattr(batch, name)
        assert column.dtype == values.dtype, name
        np.testing.assert_array_equal(column, values, err_msg=name)
    np.testing.assert_array_equal(batch.stream("logprobs"), floats(-6, -7, -8, -3, -4, -4))
    with pytest.raises(ValueError, match='unknown stream "values"'):
        batch.stream("values")


def columns(batch: _core.RolloutBatch) -> dict[str, NDArray[Any]]:
    names = ["tokens", "offsets", "prompt_lengths", "response_offsets", "group_ids"]
    names += ["finish_reasons", "weight_versions", "scores", "rewards"]
    return {name: getattr(batch, name) for name in names} | {"stream": batch.stream("logprobs")}


def test_no_column_is_copied_or_can_be_written_to() -> None:
    batch = small_batch().with_scores(floats(1, 2, 3, 4))
    again = columns(batch)
    for name, column in columns(batch).items():
        assert not column.flags.owndata, name
        assert column.ctypes.data == again[name].ctypes.data, name
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            column.setflags(write=True)
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            column[1:].view(np.uint8).setflags(write=True)


def test_torch_shares_a_column_without_a_copy_or_a_warning() -> None:
    tokens = small_batch().tokens
    tensor = torch.from_dlpack(tokens)  # pytest makes a warning an error
    assert tensor.data_ptr() == tokens.ctypes.data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors, and says so once
        for share in (lambda it: torch.asarray(it, copy=False), torch.from_numpy):
            assert share(tokens).data_ptr() == tokens.ctypes.data


def test_columns_outlive_the_buffer_and_the_batch() -> None:
    batch = small_batch()
    views = [batch.tokens, batch.with_scores(floats(1, 2, 3, 4)).offsets]
    tensor = torch.from_dlpack(batch.stream("logprobs"))
    del batch
    gc.collect()
    for _ in range(20):  # whoever reuses freed memory writes over it
        small_batch()
    np.testing.assert_array_equal(views[0], ids(5, 6, 7, 5, 8, 1, 2, 3, 1, 2, 4, 4))
    np.testing.assert_array_equal(views[1], [0, 3, 5, 8, 12])
    assert tensor.tolist() == [-6, -7, -8, -3, -4, -4]


def test_scores_make_a_new_batch_that_shares_the_rows() -> None:
    batch = small_batch()
    scored = batch.with_scores(floats(1, 2, 3, 4), floats(0, 1, 0, 1))
    assert batch.scores is None
    assert batch.rewards is None
    assert scored.scores is not None
    assert scored.rewards is not None
    assert scored.scores.tolist() == [1, 2, 3, 4]
    assert scored.rewards.tolist() == [0, 1, 0, 1]
    assert scored.tokens.ctypes.data == batch.tokens.ctypes.data
    rewards = batch.with_scores(floats(1, 2, 3, 4)).rewards
    assert rewards is not None
    assert rewards.tolist() == [1, 2, 3, 4]


def scored_batch(rewards: NDArray[np.float32], group_size: int) -> _core.RolloutBatch:
    buffer = _core.RolloutBuffer(group_size, streams=())
    for row in range(len(rewards)):
        buffer.push(row // group_size, ids(1), ids(2), finish_reason=0, weight_version=0)
    return take(buffer, len(rewards) // group_size).with_scores(rewards)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("std_floor", [0.0, 0.7])
def test_advantages_are_those_of_the_kernel(
    scale: Any, leave_one_out: bool, std_floor: float
) -> None:
    rewards = np.random.default_rng(0).normal(3.0, 0.5, 35).astype(np.float32)
    found = scored_batch(rewards, 7).advantages(scale, std_floor, leave_one_out)
    expected = group_advantages(
        torch.from_numpy(rewards).double(),
        7,
        scale=scale,
        leave_one_out=leave_one_out,
        std_floor=std_floor,
        eps=1e-6,
    )
    assert found.dtype == np.float32
    # Both in 64 bits; ours is rounded to 32 at the end.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-7, atol=1e-12)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 5))
def test_equal_rewards_have_advantages_of_exactly_zero(reward: float, group_size: int) -> None:
    batch = scored_batch(np.full(group_size, reward, dtype=np.float32), group_size)
    for scale in ("std", "none"):
        assert not batch.advantages(scale, eps=0.0).any()


def test_gathered_rows_are_those_of_the_batch() -> None:
    batch = small_batch()
    indices = np.array([3, 0])
    tokens, position_ids, response_mask, cu_seqlens = batch.gather(indices)
    np.testing.assert_array_equal(tokens, ids(1, 2, 4, 4, 5, 6, 7))
    np.testing.assert_array_equal(position_ids, ids(0, 1, 2, 3, 0, 1, 2))
    np.testing.assert_array_equal(response_mask, [False, False, True, True, False, True, True])
    np.testing.assert_array_equal(cu_seqlens, ids(0, 4, 7))
    logprobs = batch.gather_stream("logprobs", indices)
    np.testing.assert_array_equal(logprobs, floats(0, 0, -4, -4, 0, -6, -7))
    spread = batch.spread(floats(1, 2, 3, 4), indices)
    np.testing.assert_array_equal(spread, floats(0, 0, 4, 4, 0, 1, 1))
    for array in (tokens, position_ids, response_mask, cu_seqlens, logprobs, spread):
        assert torch.from_numpy(array).data_ptr() == array.ctypes.data  # writable: no warning


def test_gathered_groups_lie_as_their_layout_says() -> None:
    core = _core.Tokenizer.from_json(tiny.tokenizer().backend_tokenizer.to_str())
    buffer = _core.RolloutBuffer(2)
    buffer.push_teacher(8, core, "", end_id=9, max_tokens=1)
    for group_id, prompt_ids in [(7, ids(1, 2)), (8, ids(3))]:
        push(buffer, group_id, prompt_ids, ids(4))
        push(buffer, group_id, prompt_ids, ids(5, 6))
    batch = take(buffer, 2)
    tokens = batch.gather_groups(np.array([1, 0]))
    np.testing.assert_array_equal(tokens, ids(3, 4, 5, 6, 9, 1, 2, 4, 5, 6))
    layout = _core.group_layout(
        batch.prompt_lengths[:: batch.group_size],
        np.diff(batch.response_offsets),
        np.arange(0, len(batch) + 1, batch.group_size),
        np.diff(batch.teacher_offsets),
        np.array([1, 0]),
    )
    position_ids, segment_ids, cu_seqlens = (column.tolist() for column in layout)
    assert position_ids == [0, 1, 1, 2, 1, 0, 1, 2, 2, 3]
    assert segment_ids == [0, 1, 2, 2, 3, 0, 0, 1, 2, 2]
    assert cu_seqlens == [0, 5, 10]
    with pytest.raises(ValueError, match=r"group_indices\[0\] .* below 2, got 2"):
        batch.gather_groups(np.array([2]))


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 9])
@pytest.mark.parametrize("text", ["alpha beta gamma", "alpha <end> beta", "", "<end>"])
def test_a_teacher_response_is_cut_as_the_text_codec_cuts_it(
    tmp_path: Path, text: str, max_tokens: int
) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    codec = TextCodec.from_pretrained(tmp_path)
    buffer = _core.RolloutBuffer(1)
    core = _core.Tokenizer.from_file(tmp_path / "tokenizer.json")
    push(buffer, 0, ids(1), ids(1))
    buffer.push_teacher(0, core, text, end_id=codec.end_id, max_tokens=max_tokens)
    batch = take(buffer, 1)
    (expected,) = codec.encode_responses([text], max_tokens=max_tokens)
    np.testing.assert_array_equal(batch.teacher_tokens, expected.ids)
    np.testing.assert_array_equal(batch.teacher_offsets, [0, len(expected)])


def test_a_teacher_response_that_does_not_fit_is_refused() -> None:
    core = _core.Tokenizer.from_json(tiny.tokenizer().backend_tokenizer.to_str())
    buffer = _core.RolloutBuffer(1)
    with pytest.raises(_core.TokenizerError, match="lone surrogate"):
        buffer.push_teacher(0, core, "\ud800", end_id=1, max_tokens=9)
    with pytest.raises(ValueError, match="end_id must be at least 0, got -1"):
        buffer.push_teacher(0, core, "", end_id=-1, max_tokens=9)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        buffer.push_teacher(0, core, "", end_id=1, max_tokens=0)
    buffer.push_teacher(0, core, "", end_id=1, max_tokens=9)
    with pytest.raises(ValueError, match="group_id 0 already has its teacher response"):
        buffer.push_teacher(0, core, "", end_id=1, max_tokens=9)


def test_a_group_with_a_rollout_that_is_too_old_is_dropped_and_counted() -> None:
    buffer = _core.RolloutBuffer(2, max_staleness=1)
    for group_id, versions in [(0, (0, 2)), (1, (2, 1)), (2, (2, 2))]:
        for version in versions:
            push(buffer, group_id, ids(1), ids(1), version=version)
    assert (buffer.ready_groups, len(buffer), buffer.num_dropped) == (3, 6, 0)
    assert take(buffer, 1, version=2).group_ids.tolist() == [1, 1]
    assert (buffer.ready_groups, len(buffer), buffer.num_dropped) == (1, 2, 1)
    assert buffer.take(1, current_version=4, timeout=0.0) is None
    assert (buffer.ready_groups, len(buffer), buffer.num_dropped) == (0, 0, 2)


def good_rollout() -> dict[str, Any]:
    return {
        "group_id": 0,
        "prompt_ids": ids(1, 2),
        "response_ids": ids(3, 4),
        "finish_reason": 0,
        "weight_version": 0,
        "logprobs": floats(0, 0),
    }


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt_ids": ids()}, ValueError, "prompt_ids must hold at least one id"),
        ({"prompt_ids": ids(1, -9)}, ValueError, r"prompt_ids\[1\] must be at least 0, got -9"),
        ({"prompt_ids": ids(1, 3)}, ValueError, "prompt_ids differ .* group_id 0"),
        ({"prompt_ids": [1, 2]}, TypeError, "ndarray"),
        ({"prompt_ids": np.array([1, 2])}, TypeError, "int64"),
        ({"response_ids": ids()}, ValueError, "response_ids must hold at least one id"),
        ({"response_ids": ids(-1, 1)}, ValueError, r"response_ids\[0\] must be at least 0"),
        ({"response_ids": ids(1)}, ValueError, "logprobs must have one .* response id, 1, got 2"),
        ({"response_ids": np.zeros((2, 2), np.int32)}, TypeError, "dimension"),
        ({"finish_reason": 2}, ValueError, "finish_reason must be 0 .* got 2"),
        ({"finish_reason": "stop"}, TypeError, "int"),
        ({"weight_version": 2**80}, OverflowError, "too large"),
        ({"group_id": None}, TypeError, "int"),
        ({"logprobs": np.zeros(2)}, TypeError, "logprobs must be .* float32, got .* float64"),
        ({"logprobs": None}, TypeError, "logprobs must be a numpy array"),
        ({"values": floats(0, 0)}, ValueError, 'unknown stream "values"'),
        ({"\ud800": floats(0, 0)}, UnicodeEncodeError, "surrogates"),
    ],
)
def test_a_rollout_that_does_not_fit_is_refused_and_leaves_no_trace(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    buffer = _core.RolloutBuffer(2)
    buffer.push(**good_rollout())
    with pytest.raises(error, match=message):
        buffer.push(**good_rollout() | wrong)
    assert (buffer.ready_groups, len(buffer)) == (0, 1)
    buffer.push(**good_rollout())
    with pytest.raises(ValueError, match="group_id 0 already has its 2 rollouts"):
        buffer.push(**good_rollout())


def test_a_rollout_without_one_of_the_streams_is_refused() -> None:
    rollout = good_rollout()
    del rollout["logprobs"]
    with pytest.raises(ValueError, match='stream "logprobs" is missing'):
        _core.RolloutBuffer(2).push(**rollout)


def test_arrays_in_any_memory_are_read_as_numpy_reads_them() -> None:
    buffer = _core.RolloutBuffer(1)
    backwards, every_other = np.arange(9, dtype=np.int32)[::-1], np.arange(12, dtype=np.int32)[::3]
    push(buffer, 0, backwards, every_other)
    np.testing.assert_array_equal(take(buffer, 1).tokens, np.concatenate([backwards, every_other]))
    unaligned = np.frombuffer(bytearray(13), dtype=np.uint8)[1:].view(np.int32)
    push(buffer, 0, ids(1), ids(1))
    with pytest.raises(ValueError, match="prompt_ids must lie at an aligned address"):
        push(buffer, 1, unaligned[::2], ids(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.RolloutBuffer(0), "group_size must be at least 1, got 0"),
        (lambda: _core.RolloutBuffer(1, max_staleness=-1), "max_staleness must be at least 0"),
        (lambda: _core.RolloutBuffer(1, streams=["a", "a"]), 'different names, got "a" twice'),
        (
            lambda: _core.RolloutBuffer(1).take(0, current_version=0),
            "num_groups must be at least 1, got 0",
        ),
        (
            lambda: _core.RolloutBuffer(1).take(1, current_version=0, timeout=-1.0),
            "timeout must be at least 0 seconds",
        ),
        (
            lambda: _core.RolloutBuffer(1).take(1, current_version=0, timeout=float("nan")),
            "timeout must be at least 0 seconds",
        ),
        (lambda: small_batch().advantages(), "the batch has no rewards"),
        (lambda: small_batch().with_scores(floats(1)), "scores must have one .* rollout, 4, got 1"),
        (
            lambda: small_batch().with_scores(floats(1, 2, 3, float("nan"))),
            r"scores\[3\] must be finite",
        ),
        (
            lambda: small_batch().with_scores(floats(1, 2, 3, 4), floats(1)),
            "rewards must have one .* rollout, 4, got 1",
        ),
        (
            lambda: scored_batch(floats(1), 1).advantages("batch"),  # pyright: ignore[reportArgumentType]
            'scale must be "std" or "none", got "batch"',
        ),
        (lambda: scored_batch(floats(1), 1).advantages(eps=-1.0), "eps must be a finite number"),
        (
            lambda: scored_batch(floats(1), 1).advantages(std_floor=float("inf")),
            "std_floor must be a finite number",
        ),
        (lambda: small_batch().gather(np.array([0, 4])), r"indices\[1\] .* below 4, got 4"),
        (lambda: small_batch().gather(np.array([-1])), r"indices\[0\] must be at least 0"),
        (
            lambda: small_batch().spread(floats(1), np.array([0])),
            "values must have one .* rollout, 4, got 1",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_many_threads_push_while_one_takes_and_nothing_is_lost() -> None:
    num_groups, group_size = 60, 4
    buffer = _core.RolloutBuffer(group_size)

    def member(index: int) -> None:
        for group_id in range(num_groups):
            push(buffer, group_id, ids(group_id), ids(index, group_id))

    threads = [threading.Thread(target=member, args=(index,)) for index in range(group_size)]
    for thread in threads:
        thread.start()
    group_ids = []
    for _ in range(num_groups // 5):
        batch = buffer.take(5, current_version=0, timeout=30.0)
        assert batch is not None
        rows = batch.tokens.reshape(-1, 3)
        np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
        np.testing.assert_array_equal(rows[:, 0], batch.group_ids)
        assert np.sort(rows[:, 1].reshape(-1, group_size)).tolist() == [[0, 1, 2, 3]] * 5
        group_ids += batch.group_ids.tolist()
    for thread in threads:
        thread.join()
    assert sorted(group_ids) == [group_id for group_id in range(num_groups) for _ in range(4)]
    assert len(buffer) == 0


def test_a_wait_lets_other_threads_run_and_ends_with_the_last_rollout() -> None:
    buffer = _core.RolloutBuffer(1)
    waiting = threading.Event()
    batches: list[_core.RolloutBatch | None] = []

    def wait() -> None:
        waiting.set()
        batches.append(buffer.take(1, current_version=0))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(30)
    push(buffer, 0, ids(1), ids(2))
    thread.join(30)
    (batch,) = batches
    assert batch is not None
    assert batch.tokens.tolist() == [1, 2]


def test_closing_ends_a_wait_and_refuses_rollouts() -> None:
    buffer = _core.RolloutBuffer(1)
    batches: list[_core.RolloutBatch | None] = []
    thread = threading.Thread(target=lambda: batches.append(buffer.take(1, current_version=0)))
    thread.start()
    assert not buffer.is_closed
    buffer.close()
    buffer.close()
    thread.join(30)
    assert batches == [None]
    assert buffer.is_closed
    with pytest.raises(ValueError, match="the rollout buffer is closed"):
        push(buffer, 0, ids(1), ids(1))


def test_ctrl_c_ends_a_wait() -> None:
    program = """
import numpy
from gad_fast import _core
buffer = _core.RolloutBuffer(1)
try:
    print("waiting", flush=True)
    buffer.take(1, current_version=0)
except KeyboardInterrupt:
    print("interrupted")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output == "interrupted\n"
