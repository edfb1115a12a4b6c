"""The static engine: the student's live weights, a preallocated cache and no idle rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gad_fast.errors import EngineError
from gad_fast.records import Logprobs, Response
from gad_fast.rollout.engine import (
    EngineCaps,
    FinishReason,
    GenOutput,
    GenRequest,
    Sampling,
)
from gad_fast.rollout.in_process import InProcessEngine
from gad_fast.rollout.requests import in_a_line, shared_sampling
from gad_fast.rollout.static.cache import RowCache, require_memory
from gad_fast.rollout.static.decoder import Decoder
from gad_fast.rollout.static.sampler import draw
from gad_fast.rollout.static.scheduler import Finished, Rollout, Scheduler
from gad_fast.rollout.static.support import cache_like, require_rows
from gad_fast.rollout.streams import uniforms


class StaticEngine(InProcessEngine):
    """Samples a token of every row at a time; rows of finished rollouts go to waiting ones.

    A rollout depends on its request, its number and its seed alone, up to roundings of the matrix
    products: they differ with the number of rows, so that two tokens may change places where the
    random number falls within a rounding of the border between them.
    """

    caps = EngineCaps(logprobs=True, in_place=True)

    def start(self) -> None:
        """Raises EngineError when the model's cache cannot be kept in rows."""
        with self._precision.autocast():
            require_rows(
                self._model, self._precision.device, max_tokens=self._capacity.longest_sequence
            )

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of all requests as they finish."""
        if not requests:
            return
        sampling = shared_sampling(self._model, requests)
        num_columns = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens - 1
        rollouts = self._rollouts(requests)
        num_rows = min(self._capacity.rows(num_columns), len(rollouts))
        scheduler = Scheduler(
            rollouts,
            num_rows=num_rows,
            max_tokens=sampling.max_tokens,
            end_id=self._endings.end_id,
        )
        # One context for all steps: autocast casts the weights once in it, not once a step.
        with _told_as_engine_error(num_rows), self._precision.autocast():
            decoder = self._decoder(num_rows, num_columns)
            while outputs := self._until_some_finish(scheduler, decoder, sampling):
                with torch.autocast(self._precision.device.type, enabled=False):
                    yield from outputs

    def _rollouts(self, requests: Sequence[GenRequest]) -> list[Rollout]:
        return [
            Rollout(request, index, self._endings.watch(request.sampling))
            for request in requests
            for index in range(request.n)
        ]

    def _decoder(self, num_rows: int, num_columns: int) -> Decoder:
        device = self._precision.device
        like = cache_like(self._model, device)
        require_memory(like, num_rows=num_rows, num_columns=num_columns)
        cache = RowCache(like, num_rows=num_rows, num_columns=num_columns)
        return Decoder(self._model, cache, device)

    def _until_some_finish(
        self, scheduler: Scheduler, decoder: Decoder, sampling: Sampling
    ) -> list[GenOutput]:
        """Decodes until a rollout finishes; no outputs when none is left."""
        decoder.enter(scheduler.enter())
        while scheduler.num_active:
            logits = decoder.step(scheduler.inputs, scheduler.positions)
            tokens, logprobs = draw(logits, sampling, uniforms(*scheduler.draws))
            ends = scheduler.record(tokens.cpu().numpy(), _finite(logprobs))
            if ends:
                return [self._output(self._leave(scheduler, decoder, *end)) for end in ends]
        return []

    @staticmethod
    def _leave(scheduler: Scheduler, decoder: Decoder, row: int, reason: FinishReason) -> Finished:
        last, length = scheduler.last_row
        decoder.move(last, row, length)
        return scheduler.leave(row, reason)

    def _output(self, finished: Finished) -> GenOutput:
        is_finished = finished.reason is FinishReason.END
        return GenOutput(
            finished.rollout.request.group_id,
            finished.rollout.index,
            Response(finished.ids, is_finished),
            finished.logprobs,
            finished.reason,
            self._weight_version,
        )


def _finite(logprobs: Tensor) -> Logprobs:
    values = logprobs.cpu().numpy()
    if not np.isfinite(values).all():
        raise EngineError(
            "the student's logits are not finite (a training step has broken its weights: lower "
            "the learning rate, or start from an earlier checkpoint)"
        )
    return values


@contextlib.contextmanager
def _told_as_engine_error(num_rows: int) -> Generator[None]:
    """A failure of torch in the engine's words; errors of the caller's between outputs pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"out of memory with {num_rows} rollouts at once: {in_a_line(error)} "
            f"(set rollout.max_sequences = {max(1, num_rows // 2)})"
        ) from error
    except EngineError:
        raise
    except RuntimeError as error:
        raise EngineError(f"sampling {num_rows} rollouts failed: {in_a_line(error)}") from error
