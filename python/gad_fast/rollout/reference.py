"""The reference engine: transformers' `generate` on the student's live weights.

Slow and right: the oracle for every other engine. It knows token ids only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.models.loading import Precision
from gad_fast.records import Ids, Response
from gad_fast.rollout.engine import (
    EngineCaps,
    GenOutput,
    GenRequest,
    Sampling,
    SyncReport,
    WeightSource,
)


class ReferenceEngine:
    """Samples with `generate`, at most `max_sequences` rollouts at once.

    `generate` has one random stream for a whole batch: rollouts repeat for the same requests with
    the same seeds in the same order, not for each request on its own.
    """

    caps = EngineCaps(logprobs=False, in_place=True)

    def __init__(
        self,
        live_model: Callable[[], PreTrainedModel],
        precision: Precision,
        *,
        end_id: int,
        max_sequences: int,
    ) -> None:
        """Samples from nothing yet.

        Args:
            live_model: gives the student's model, its adapter active if it has one.
            precision: of its forward passes.
            end_id: ends a response.
            max_sequences: most rollouts at once.
        """
        self._live_model = live_model
        self._precision = precision
        self._end_id = end_id
        self._max_sequences = max_sequences
        self._weight_version = 0

    def start(self) -> None:
        """Nothing to do: the weights are there."""

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of all requests, which must share their sampling settings."""
        if not requests:
            return
        sampling = requests[0].sampling
        assert all(request.sampling == sampling for request in requests)
        rows = [request for request in requests for _ in range(request.n)]
        rows.sort(key=lambda request: len(request.prompt_ids))  # little padding in each batch
        with torch.random.fork_rng(_cuda_devices(self._precision.device)):
            torch.manual_seed(requests[0].seed)
            for start in range(0, len(rows), self._max_sequences):
                yield from self._generate_batch(rows[start : start + self._max_sequences], sampling)

    def sync_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Notes the version: the engine samples from the trainer's own weights."""
        del source
        self._weight_version = version
        return SyncReport(version, num_tensors=0, seconds=0.0)

    def health(self) -> None:
        """Always well: it lives in this process."""

    def close(self) -> None:
        """Nothing to free."""

    def _generate_batch(
        self, rows: Sequence[GenRequest], sampling: Sampling
    ) -> Iterator[GenOutput]:
        ids, mask = self._pad_left([row.prompt_ids for row in rows])
        model: Any = self._live_model()
        try:
            with torch.no_grad(), self._precision.autocast(), _without_defaults(model):
                sequences: Tensor = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=_cache(model),
                    generation_config=self._generation_config(sampling),
                )
        except RuntimeError as error:
            raise EngineError(f"generate failed on {len(rows)} rollouts: {error}") from error
        new_ids = sequences[:, ids.shape[1] :].cpu().numpy().astype(np.int32)
        for row, sampled in zip(rows, new_ids, strict=True):
            response = Response.cut(sampled, end_id=self._end_id, max_tokens=sampling.max_tokens)
            yield GenOutput(row.group_id, response, None, self._weight_version)

    def _pad_left(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), width), self._end_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        device = self._precision.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        is_greedy = sampling.temperature == 0
        return GenerationConfig(
            do_sample=not is_greedy,
            temperature=None if is_greedy else sampling.temperature,
            top_k=0,  # None would mean 50
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self._end_id,
            pad_token_id=self._end_id,
        )


@contextlib.contextmanager
def _without_defaults(model: Any) -> Generator[None]:
    """Hides the model's own generation settings.

    `generate` fills what a caller leaves open from the model's generation_config.json, where
    repetition penalties, top-p and further end tokens hide: the student would then sample from
    another distribution than the one that the policy loss differentiates.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _cache(model: PreTrainedModel) -> DynamicCache | None:
    """The cache to generate with; None lets `generate` choose.

    transformers' sliding cache of a window of one keeps `-window + 1 = -0` tokens, which is all of
    them, and the tokens it yields are wrong. A full cache under the window's mask is right.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return DynamicCache() if window == 1 else None


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
