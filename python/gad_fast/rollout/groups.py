"""Whole groups from an engine that gives single rollouts, in whatever order they finish."""

from __future__ import annotations

from collections.abc import Sequence

from gad_fast._core import FINISH_LENGTH, FINISH_STOP, RolloutBatch, RolloutBuffer
from gad_fast.errors import EngineError
from gad_fast.records import EncodedExample, Group, Response
from gad_fast.rollout.engine import GenRequest, RolloutEngine, Sampling


def sample_groups(
    engine: RolloutEngine,
    prompts: Sequence[EncodedExample],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    weight_version: int,
) -> list[Group]:
    """Samples `group_size` rollouts of each prompt; groups come in the order of the prompts.

    Args:
        engine: what samples.
        prompts: one a group.
        group_size: rollouts a prompt.
        sampling: how tokens are drawn.
        seed: of the random numbers.
        weight_version: that of the student now; the losses take rollouts to be its own.

    Raises:
        EngineError: the engine gave too few rollouts, or some of older weights.
    """
    requests = [
        GenRequest(group_id, prompt.prompt_ids, group_size, sampling, seed)
        for group_id, prompt in enumerate(prompts)
    ]
    buffer = RolloutBuffer(group_size, streams=(), max_staleness=0)
    for output in engine.generate(requests):
        buffer.push(
            output.group_id,
            prompts[output.group_id].prompt_ids,
            output.response.ids,
            finish_reason=FINISH_STOP if output.response.is_finished else FINISH_LENGTH,
            weight_version=output.weight_version,
        )
    batch = buffer.take(len(prompts), current_version=weight_version, timeout=0.0)
    if batch is None:
        raise EngineError(
            f"the engine gave {buffer.ready_groups} of {len(prompts)} whole groups of weight "
            f"version {weight_version} ({buffer.num_dropped} were of older weights)"
        )
    return _groups(batch, prompts)


def _groups(batch: RolloutBatch, prompts: Sequence[EncodedExample]) -> list[Group]:
    """The groups of a batch by prompt; the ids are views of the batch's memory."""
    starts = batch.offsets[:-1] + batch.prompt_lengths
    rollouts = [
        Response(batch.tokens[start:end], bool(reason == FINISH_STOP))
        for start, end, reason in zip(starts, batch.offsets[1:], batch.finish_reasons, strict=True)
    ]
    size = batch.group_size
    by_prompt = {
        int(group_id): rollouts[index * size : (index + 1) * size]
        for index, group_id in enumerate(batch.group_ids[::size])
    }
    return [Group(prompt, by_prompt[index]) for index, prompt in enumerate(prompts)]
