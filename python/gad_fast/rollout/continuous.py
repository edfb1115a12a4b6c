"""The continuous engine: transformers' continuous batching on the student's live weights.

It pages its cache, so that it takes models with sliding windows. It computes in the weights' own
dtype: its forward passes run in a thread that the trainer's autocast does not reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.models.attention import NAME as ROW_ATTENTION
from gad_fast.records import Ids, Logprobs
from gad_fast.rollout.engine import (
    EngineCaps,
    GenOutput,
    GenRequest,
    Sampling,
)
from gad_fast.rollout.in_process import InProcessEngine
from gad_fast.rollout.reference import generation_config, without_defaults
from gad_fast.rollout.requests import in_a_line, shared_sampling
from gad_fast.rollout.streams import stream_key

BLOCK_SIZE = 32
"""Tokens of a page of the cache."""
BATCH_TOKENS = 2048
"""At most so many tokens, prompts' and new ones together, in one forward pass."""

# How far, in nats, log-probabilities made in two ways may be apart.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.3


class ContinuousEngine(InProcessEngine):
    """Samples with transformers' `generate_batch`, whose manager lives for one call.

    A manager that outlived an update would answer from blocks of the old weights. Rollouts repeat
    for the same requests with the same seeds in the same order, not for each on its own.
    """

    caps = EngineCaps(logprobs=True, in_place=True)

    def start(self) -> None:
        """Raises EngineError when a short answer fails, or its log-probabilities are wrong."""
        # transformers' cache of a window of one token keeps all tokens, for instance.
        embeddings: Any = self._model.get_input_embeddings()
        random = np.random.default_rng(0)
        prompt = random.integers(embeddings.num_embeddings, size=6).astype(np.int32)
        try:
            (output,) = self.generate([GenRequest(0, prompt, 1, Sampling(0.0, 5), seed=0)])
        except (ValueError, AttributeError, TypeError, NotImplementedError) as error:
            # How transformers says no depends on what the model lacks; after a start that went
            # well these are mistakes, and keep their traceback.
            raise EngineError(f"continuous batching failed: {in_a_line(error)}") from error
        expected = self._dense_logprobs(prompt, output)
        assert output.logprobs is not None
        gap = np.abs(expected - output.logprobs).max()
        limit = _TOLERANCE.get(self._model.dtype, _COARSE)
        if np.isfinite(expected).all() and not gap <= limit:
            raise EngineError(
                f"its log-probabilities are {gap:.1e} nats off a whole pass (over {limit:.0e})"
            )

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
        try:
            with self._manager(requests, sampling) as manager:
                for name, (request, _) in by_name.items():
                    manager.add_request(
                        request.prompt_ids.tolist(),
                        request_id=name,
                        max_new_tokens=sampling.max_tokens,
                    )
                for result in _results(manager, len(by_name)):
                    yield self._output(result, *by_name[result.request_id])
        except EngineError:
            raise
        except RuntimeError as error:
            raise EngineError(f"continuous batching failed: {in_a_line(error)}") from error

    @contextlib.contextmanager
    def _manager(self, requests: Sequence[GenRequest], sampling: Sampling) -> Generator[Any]:
        model: Any = self._model
        with (
            torch.random.fork_rng(_cuda_devices(self._precision.device)),
            without_defaults(model),
            _own_attention(model),
            model.continuous_batching_context_manager(
                generation_config=generation_config(sampling, self._endings.end_id),
                continuous_batching_config=self._settings(requests, sampling),
                timeout=5,
            ) as manager,
        ):
            yield manager

    def _settings(
        self, requests: Sequence[GenRequest], sampling: Sampling
    ) -> ContinuousBatchingConfig:
        """Sizes that follow from the requests; left to itself it takes most of the memory."""
        longest = max(len(request.prompt_ids) for request in requests) + sampling.max_tokens
        wanted = sum(request.n for request in requests)
        rows = min(self._capacity.rows(longest), wanted)
        first = requests[0]
        return ContinuousBatchingConfig(
            block_size=BLOCK_SIZE,
            num_blocks=rows * -(-longest // BLOCK_SIZE) + 1,
            max_batch_tokens=max(BATCH_TOKENS, rows),
            max_requests_per_batch=rows,
            allow_block_sharing=False,
            return_logprobs=True,
            seed=stream_key(first.seed, first.group_id, 0) % 2**63,
        )

    def _dense_logprobs(self, prompt: Ids, output: GenOutput) -> Logprobs:
        """The same without a cache, at temperature 1."""
        new = output.response.ids.astype(np.int64)
        row = torch.from_numpy(np.concatenate([prompt, new])).to(self._precision.device)
        model: Any = self._model
        with torch.no_grad():
            logits = model(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(-1, row[len(prompt) :, None])
        return logprobs[:, 0].cpu().numpy()

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


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
