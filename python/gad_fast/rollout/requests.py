"""What every engine asks of its requests before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.rollout.engine import GenRequest, Sampling


def shared_sampling(model: PreTrainedModel, requests: Sequence[GenRequest]) -> Sampling:
    """The sampling settings of all requests, each of which fits the model.

    Raises:
        EngineError: a prompt is empty, or too long for the model with the tokens asked for.
    """
    sampling = requests[0].sampling
    assert all(request.sampling == sampling and request.n >= 1 for request in requests)
    limit = max_positions(model)
    for request in requests:
        length = len(request.prompt_ids)
        if length == 0:
            raise EngineError(f"prompt {request.group_id} has no tokens, at least 1 is needed")
        if limit is not None and length + sampling.max_tokens > limit:
            raise EngineError(
                f"prompt {request.group_id} has {length} tokens and max_tokens is "
                f"{sampling.max_tokens}, but the model reads at most {limit} together "
                f"(leave the prompt out, or lower max_tokens)"
            )
    return sampling


def max_positions(model: PreTrainedModel) -> int | None:
    """Most tokens that a model can read, None where it does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
