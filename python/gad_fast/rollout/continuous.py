"""The continuous engine: transformers' continuous batching on the student's live weights.

It pages its cache, and leaves attention to the model. It computes in the weights' own dtype: its
forward passes run in a thread that the trainer's autocast does not reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import ContinuousBatchingConfig, PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.models.attention import NAME as ROW_ATTENTION
from gad_fast.rollout.engine import EngineCaps, GenOutput, GenRequest, Sampling
from gad_fast.rollout.failures import told_as_engine_error
from gad_fast.rollout.in_process import InProcessEngine
from gad_fast.rollout.reference import generation_config, without_defaults
from gad_fast.rollout.requests import shared_sampling
from gad_fast.rollout.room import one_token_cache, require_room
from gad_fast.rollout.streams import stream_key
from gad_fast.rollout.whole_pass import require_whole_pass_logprobs

BLOCK_SIZE = 32
"""Tokens of a page of the cache."""
BATCH_TOKENS = 2048
"""At most so many tokens, prompts' and new ones together, in one forward pass."""


class ContinuousEngine(InProcessEngine):
    """Samples with transformers' `generate_batch`, whose manager lives for one call.

    A manager that outlived an update would answer from blocks of the old weights. Rollouts repeat
    for the same requests with the same seeds in the same order, not for each on its own.
    """

    caps = EngineCaps(logprobs=True, in_place=True)

    def start(self) -> None:
        """Raises EngineError when a short answer fails, or its log-probabilities are wrong."""
        # transformers' cache of a window of one token keeps all tokens, for instance.
        require_whole_pass_logprobs(self, self._model, self._precision.device)

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of all requests as they finish."""
        if not requests:
            return
        sampling = shared_sampling(self._model, requests)
        by_name = {
            f"{at}:{index}": (request, index)
            for at, request in enumerate(requests)
            for index in range(request.n)
        }
        longest = max(len(request.prompt_ids) for request in requests) + sampling.max_tokens
        rows = min(self._capacity.rows(longest), len(by_name))
        settings = self._settings(requests[0], rows=rows, longest=longest)
        with (
            told_as_engine_error("continuous batching", num_rows=rows),
            self._manager(settings, sampling) as manager,
        ):
            for name, (request, _) in by_name.items():
                manager.add_request(
                    request.prompt_ids.tolist(), request_id=name, max_new_tokens=sampling.max_tokens
                )
            for result in _results(manager, len(by_name)):
                yield self._output(result, *by_name[result.request_id])

    @contextlib.contextmanager
    def _manager(self, settings: ContinuousBatchingConfig, sampling: Sampling) -> Generator[Any]:
        model: Any = self._model
        with (
            self._own_random_state(),
            without_defaults(model),
            _own_attention(model),
            model.continuous_batching_context_manager(
                generation_config=generation_config(sampling, self._endings.end_id),
                continuous_batching_config=settings,
                timeout=5,
            ) as manager,
        ):
            yield manager

    def _settings(self, first: GenRequest, *, rows: int, longest: int) -> ContinuousBatchingConfig:
        """Sizes that follow from the requests; left to itself it takes most of the memory."""
        blocks = -(-longest // BLOCK_SIZE)
        like = one_token_cache(self._model, self._precision.device)
        require_room(like, num_rows=rows, num_columns=blocks * BLOCK_SIZE)
        return ContinuousBatchingConfig(
            block_size=BLOCK_SIZE,
            num_blocks=rows * blocks + 1,
            max_batch_tokens=max(BATCH_TOKENS, rows),
            max_requests_per_batch=rows,
            allow_block_sharing=False,
            return_logprobs=True,
            seed=stream_key(first.seed, first.group_id, 0) % 2**63,
        )

    def _output(self, result: Any, request: GenRequest, index: int) -> GenOutput:
        if result.error is not None:
            raise EngineError(f"continuous batching failed on a rollout: {result.error}")
        ids = np.array(result.generated_tokens, dtype=np.int32)
        response, reason = self._endings.cut(ids, request.sampling)
        logprobs = np.array(result.logprobs[: len(response)], dtype=np.float32)
        return GenOutput(request.group_id, index, response, logprobs, reason, self._weight_version)


def _results(manager: Any, count: int) -> Iterator[Any]:
    """Finished results as they come; raises EngineError when the manager's thread has died."""
    while count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            count -= 1
            yield result
        elif result is None and not manager.is_running():
            raise EngineError(
                f"continuous batching stopped with {count} rollouts to go: "
                f"{manager.background_thread_status.fatal_error}"
            )


@contextlib.contextmanager
def _own_attention(model: PreTrainedModel) -> Generator[None]:
    """Gives a model its attention back: a manager that fails while it starts leaves its own."""
    config: Any = model.config.get_text_config()
    own = config._attn_implementation
    if own == ROW_ATTENTION:
        config._attn_implementation = "sdpa"  # of which there is a paged form
    try:
        yield
    finally:
        config._attn_implementation = own
