"""The reference engine: transformers' `generate` on the student's live weights.

Slow and right: the oracle for every other engine. It knows token ids only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from gad_fast.records import Ids
from gad_fast.rollout.engine import (
    EngineCaps,
    GenOutput,
    GenRequest,
    Sampling,
)
from gad_fast.rollout.failures import told_as_engine_error
from gad_fast.rollout.in_process import InProcessEngine
from gad_fast.rollout.requests import shared_sampling
from gad_fast.rollout.streams import stream_key


class ReferenceEngine(InProcessEngine):
    """Samples with `generate`, at most `max_sequences` rollouts at once.

    `generate` has one random stream for a whole batch: rollouts repeat for the same requests with
    the same seeds in the same order, not for each request on its own.
    """

    @property
    def caps(self) -> EngineCaps:
        """In the trainer's thread on a CPU, where it waits for nobody."""
        return EngineCaps(logprobs=False, in_place=True, may_hang=self._waits_for_a_device)

    def start(self) -> None:
        """Nothing to do: the weights are there."""

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of all requests, a batch at a time."""
        if not requests:
            return
        sampling = shared_sampling(self._model, requests)
        rows = [(request, index) for request in requests for index in range(request.n)]
        rows.sort(key=lambda row: len(row[0].prompt_ids))  # little padding in each batch
        longest = len(rows[-1][0].prompt_ids) + sampling.max_tokens
        size = self._capacity.rows(longest)
        for start in range(0, len(rows), size):
            yield from self._generate_batch(rows[start : start + size], sampling)

    def _generate_batch(
        self, rows: Sequence[tuple[GenRequest, int]], sampling: Sampling
    ) -> Iterator[GenOutput]:
        ids, mask = self._pad_left([request.prompt_ids for request, _ in rows])
        model: Any = self._model
        request, index = rows[0]
        with (
            told_as_engine_error(f"generate of {len(rows)} rollouts", num_rows=len(rows)),
            self._own_random_state(),
            torch.no_grad(),
            self._precision.autocast(),
            without_defaults(model),
        ):
            torch.manual_seed(stream_key(request.seed, request.group_id, index))
            sequences: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=_cache(self._model),
                generation_config=generation_config(sampling, self._endings.end_id),
            )
        new_ids = sequences[:, ids.shape[1] :].cpu().numpy().astype(np.int32)
        for (request, index), sampled in zip(rows, new_ids, strict=True):
            response, reason = self._endings.cut(sampled, sampling)
            yield GenOutput(request.group_id, index, response, None, reason, self._weight_version)

    def _pad_left(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), width), self._endings.end_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        device = self._precision.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def generation_config(sampling: Sampling, end_id: int) -> GenerationConfig:
    """Sampling settings as transformers takes them."""
    if sampling.temperature == 0:
        config = GenerationConfig(do_sample=False)
    else:
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,  # None would mean 50
            top_p=sampling.top_p,
        )
    config.update(max_new_tokens=sampling.max_tokens, eos_token_id=end_id, pad_token_id=end_id)
    return config


@contextlib.contextmanager
def without_defaults(model: Any) -> Generator[None]:
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
