"""Whole groups from an engine that gives single rollouts, in whatever order they finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gad_fast._core import FINISH_LENGTH, FINISH_STOP, RolloutBatch, RolloutBuffer
from gad_fast.errors import ConfigError, EngineError
from gad_fast.records import EncodedExample, Group, Logprobs, Response
from gad_fast.rollout.engine import GenOutput, GenRequest, RolloutEngine, Sampling
from gad_fast.rollout.patience import outputs_within

DEFAULT_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What groups are asked for."""

    group_size: int
    """Rollouts a prompt."""
    sampling: Sampling
    """From the whole distribution: the losses take every token to be drawn from it."""
    seed: int
    weight_version: int
    """That of the student now; the losses take rollouts to be its own."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """Longest wait for a rollout to finish."""


@dataclass(frozen=True, slots=True)
class Found:
    """A group as soon as it is complete."""

    index: int
    """Of its prompt."""
    group: Group


class GroupsError(EngineError):
    """The engine failed, or gave too few rollouts; the groups that are complete are not lost."""

    def __init__(self, message: str, found: Sequence[Found]) -> None:
        super().__init__(message)
        self.found = list(found)
        """Complete groups, in the order in which they came."""


def sample_groups(
    engine: RolloutEngine,
    prompts: Sequence[EncodedExample],
    plan: GroupPlan,
    *,
    kept: Mapping[int, Group] | None = None,
) -> list[Group]:
    """Samples a group for each prompt; groups come in the order of the prompts.

    Args:
        engine: what samples.
        prompts: what is answered.
        plan: how.
        kept: groups that are there already, by place of their prompt.

    Raises:
        GroupsError: the engine failed, gave too few rollouts, or some of older weights.
    """
    groups = dict(kept or {})
    wanted = [index for index in range(len(prompts)) if index not in groups]
    groups |= {found.index: found.group for found in iter_groups(engine, prompts, plan, wanted)}
    return [groups[index] for index in range(len(prompts))]


def iter_groups(
    engine: RolloutEngine,
    prompts: Sequence[EncodedExample],
    plan: GroupPlan,
    wanted: Sequence[int] | None = None,
) -> Iterator[Found]:
    """Samples a group for each prompt; each comes when its last rollout is finished.

    Args:
        engine: what samples.
        prompts: what is answered.
        plan: how.
        wanted: places of the prompts that lack a group; all where it is None.

    Raises:
        GroupsError: the engine failed, gave too few rollouts, or some of older weights.
        ConfigError: the sampling settings cut the distribution.
    """
    _require_trainable(plan.sampling)
    requests = [
        GenRequest(index, prompts[index].prompt_ids, plan.group_size, plan.sampling, plan.seed)
        for index in (range(len(prompts)) if wanted is None else wanted)
    ]
    streams = ("logprobs",) if engine.caps.logprobs else ()
    buffer = RolloutBuffer(plan.group_size, streams=streams, max_staleness=0)
    complete: list[Found] = []
    try:
        for output in _outputs(engine, requests, plan):
            _push(buffer, prompts[output.group_id], output)
            while (batch := _take(buffer, plan)) is not None:
                complete.append(_found(batch, prompts))
                yield complete[-1]
    except EngineError as error:
        done = f"{len(complete)} of {len(requests)} groups are complete"
        raise GroupsError(f"{error} ({done})", complete) from error
    if len(complete) < len(requests):
        raise GroupsError(
            f"the engine gave {len(complete)} of {len(requests)} whole groups of weight version "
            f"{plan.weight_version} ({buffer.num_dropped} were of older weights)",
            complete,
        )


def _outputs(
    engine: RolloutEngine, requests: Sequence[GenRequest], plan: GroupPlan
) -> Iterator[GenOutput]:
    if engine.caps.may_hang:
        return outputs_within(plan.timeout_seconds, engine, requests)
    # In the trainer's thread: a second one has OpenMP threads of its own, more than there are
    # cores, which then sleep between any two operations. Adapters sample 1.5 times as fast so.
    return engine.generate(requests)


def _require_trainable(sampling: Sampling) -> None:
    if not sampling.is_trainable:
        raise ConfigError(
            f"rollouts to learn from are drawn from the whole distribution, got top_k "
            f"{sampling.top_k}, top_p {sampling.top_p} and {len(sampling.stop)} stop strings "
            f"(leave them to gad-fast generate)"
        )


def _push(buffer: RolloutBuffer, prompt: EncodedExample, output: GenOutput) -> None:
    streams = {} if output.logprobs is None else {"logprobs": output.logprobs}
    buffer.push(
        output.group_id,
        prompt.prompt_ids,
        output.response.ids,
        finish_reason=FINISH_STOP if output.response.is_finished else FINISH_LENGTH,
        weight_version=output.weight_version,
        **streams,
    )


def _take(buffer: RolloutBuffer, plan: GroupPlan) -> RolloutBatch | None:
    return buffer.take(1, current_version=plan.weight_version, timeout=0.0)


def _found(batch: RolloutBatch, prompts: Sequence[EncodedExample]) -> Found:
    """The one group of a batch; its arrays are views of the batch's memory."""
    starts = batch.offsets[:-1] + batch.prompt_lengths
    rollouts = [
        Response(batch.tokens[start:end], bool(reason == FINISH_STOP))
        for start, end, reason in zip(starts, batch.offsets[1:], batch.finish_reasons, strict=True)
    ]
    index = int(batch.group_ids[0])
    return Found(index, Group(prompts[index], rollouts, _logprobs(batch)))


def _logprobs(batch: RolloutBatch) -> list[Logprobs] | None:
    if "logprobs" not in batch.streams:
        return None
    return np.split(batch.stream("logprobs"), batch.response_offsets[1:-1])
