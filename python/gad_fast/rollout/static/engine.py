"""The static engine: the student's live weights, a preallocated cache and no idle rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from gad_fast.models.attention import windows_noted
from gad_fast.models.few_rows import few_row_products
from gad_fast.records import Response
from gad_fast.rollout.engine import EngineCaps, FinishReason, GenOutput, GenRequest, Sampling
from gad_fast.rollout.failures import finite, told_as_engine_error
from gad_fast.rollout.in_process import InProcessEngine
from gad_fast.rollout.requests import shared_sampling
from gad_fast.rollout.room import one_token_cache, require_room
from gad_fast.rollout.sampler import draw
from gad_fast.rollout.static.cache import RowCache
from gad_fast.rollout.static.compiled import compiled_layers
from gad_fast.rollout.static.decoder import Decoder
from gad_fast.rollout.static.graphs import Size, cuda_recorder
from gad_fast.rollout.static.scheduler import Finished, Rollout, Scheduler
from gad_fast.rollout.streams import uniforms
from gad_fast.rollout.whole_pass import require_whole_pass_logprobs, require_windows


class StaticEngine(InProcessEngine):
    """Samples a token of every row at a time; rows of finished rollouts go to waiting ones.

    A rollout depends on its request, its number and its seed alone, up to roundings of the matrix
    products: they differ with the number of rows, so that two tokens may change places where the
    random number falls within a rounding of the border between them.
    """

    _compiles = False  # until the check is through, in which layers say what they ask for

    @property
    def caps(self) -> EngineCaps:
        """In the trainer's thread on a CPU, where it waits for nobody."""
        return EngineCaps(logprobs=True, in_place=True, may_hang=self._waits_for_a_device)

    def start(self) -> None:
        """Raises EngineError when the model's cache cannot be kept in rows."""
        with self._precision.autocast(), windows_noted() as windows:
            require_whole_pass_logprobs(self, self._model, self._precision.device)
        longest = self._capacity.longest_sequence
        require_windows(self._model.config, windows, longest_sequence=longest)
        self._compiles = self._precision.compiles

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of all requests as they finish."""
        if not requests:
            return
        sampling = shared_sampling(self._model, requests)
        rollouts = [
            Rollout(request, number, self._endings.watch(sampling))
            for request in requests
            for number in range(request.n)
        ]
        num_columns = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens - 1
        size = Size(min(self._capacity.rows(num_columns), len(rollouts)), num_columns)
        scheduler = Scheduler(
            rollouts,
            num_rows=size.rows,
            max_tokens=sampling.max_tokens,
            end_id=self._endings.end_id,
        )
        # One context for all steps: autocast casts the weights once in it, not once a step.
        doing = f"sampling {size.rows} rollouts"
        with told_as_engine_error(doing, num_rows=size.rows), self._precision.autocast():
            cache = self._cache(size)
            with self._fast_layers(cache):
                decoder = Decoder(self._model, cache, size, cuda_recorder(self._precision.device))
                while finished := _until_some_finish(scheduler, decoder, sampling):
                    with torch.autocast(self._precision.device.type, enabled=False):
                        yield from map(self._output, finished)

    def _cache(self, size: Size) -> RowCache:
        like = one_token_cache(self._model, self._precision.device)
        require_room(like, num_rows=size.rows, num_columns=size.width)
        return RowCache(like, num_rows=size.rows, num_columns=size.width)

    def _fast_layers(self, cache: RowCache) -> contextlib.AbstractContextManager[None]:
        if self._compiles:
            return compiled_layers(self._model, cache)
        return few_row_products(self._model)

    def _output(self, finished: Finished) -> GenOutput:
        (request, number, _), reason = finished.rollout, finished.reason
        response = Response(finished.ids, is_finished=reason is FinishReason.END)
        return GenOutput(
            request.group_id, number, response, finished.logprobs, reason, self._weight_version
        )


def _until_some_finish(
    scheduler: Scheduler, decoder: Decoder, sampling: Sampling
) -> list[Finished]:
    """Decodes until rollouts finish; none when none is left."""
    decoder.enter(scheduler.enter())
    while scheduler.num_active:
        logits = decoder.step(*scheduler.reads)
        tokens, logprobs = draw(logits, sampling, uniforms(*scheduler.draws))
        if finished := scheduler.record(tokens.cpu().numpy(), finite(logprobs)):
            for left in finished:
                decoder.move(left.last_row, left.row, left.num_cached)
            return finished
    return []
