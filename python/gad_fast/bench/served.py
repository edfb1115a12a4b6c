"""An engine behind an OpenAI-compatible completions endpoint, as vLLM serves one, to time against.

It has weights of its own, so the game does not know it: what is sampled here is only counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import openai

from gad_fast.errors import EngineError
from gad_fast.records import Response
from gad_fast.rollout.engine import (
    EngineCaps,
    FinishReason,
    GenOutput,
    GenRequest,
    SyncReport,
    WeightSource,
)
from gad_fast.rollout.failures import in_a_line

TIMEOUT_SECONDS = 3600.0
"""Of a request, which waits for all its tokens on a CPU."""
_REASONS = {"stop": FinishReason.END, "length": FinishReason.LENGTH}


class ServedEngine:
    """Rollouts over HTTP, all requests at once; without seeds, of which vLLM may die on a CPU."""

    caps = EngineCaps(logprobs=False, in_place=False)

    def __init__(self, url: str) -> None:
        """Opens no connection yet.

        Args:
            url: of the endpoint, as `http://localhost:8000/v1`.
        """
        self._url, self._model = url, ""
        self.owner = ""
        """Who serves, in the server's words; known from `start` on."""
        self._api = openai.OpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_SECONDS
        )

    def start(self) -> None:
        """Takes the first model that the server names."""
        try:
            models = list(self._api.models.list())
        except openai.OpenAIError as error:
            raise EngineError(f"no model is served at {self._url}: {in_a_line(error)}") from error
        if not models:
            raise EngineError(f"no model is served at {self._url}")
        self._model, self.owner = models[0].id, models[0].owned_by

    def generate(self, requests: Sequence[GenRequest]) -> Iterator[GenOutput]:
        """Rollouts of each request, as requests are through."""
        with ThreadPoolExecutor(max(1, len(requests))) as pool:
            asked = [pool.submit(self._ask, request) for request in requests]
            for answer in as_completed(asked):
                yield from answer.result()

    def sync_weights(self, source: WeightSource, version: int) -> SyncReport:
        """Refused: the endpoint takes none."""
        del source
        raise EngineError(f"{self._url} takes no weights (version {version})")

    def health(self) -> None:
        """Well as long as it lists its models."""
        self.start()

    def close(self) -> None:
        """Closes the connections."""
        self._api.close()

    def _ask(self, request: GenRequest) -> list[GenOutput]:
        sampling = request.sampling
        try:
            completion = self._api.completions.create(
                model=self._model,
                prompt=request.prompt_ids.tolist(),
                n=request.n,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                extra_body={"return_token_ids": True},
            )
        except openai.OpenAIError as error:
            raise EngineError(f"{self._url} failed: {in_a_line(error)}") from error
        return [self._output(request, choice) for choice in completion.choices]

    def _output(self, request: GenRequest, choice: Any) -> GenOutput:
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            raise EngineError(f"{self._url} gives no token ids (vLLM does from 0.10.2 on)")
        reason = _REASONS.get(choice.finish_reason, FinishReason.STOP)
        response = Response(np.array(ids, np.int32), is_finished=reason is FinishReason.END)
        return GenOutput(request.group_id, choice.index, response, None, reason, weight_version=0)
