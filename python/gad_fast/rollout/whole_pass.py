"""Whether an engine can take a model: shown on the model itself, not by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from gad_fast.errors import EngineError
from gad_fast.models.shared_prompts import keeps_windows, sliding_window
from gad_fast.records import Ids, Logprobs
from gad_fast.rollout.engine import GenOutput, GenRequest, RolloutEngine, Sampling
from gad_fast.rollout.failures import in_a_line

# How far, in nats, log-probabilities made in two ways may be apart.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.3
_LENGTHS = (4, 1, 6)
"""Tokens of the prompts: one of them has none before its last."""


def require_whole_pass_logprobs(
    engine: RolloutEngine, model: PreTrainedModel, device: torch.device
) -> None:
    """Compares log-probabilities of short answers with those of passes without a cache.

    Args:
        engine: gives log-probabilities.
        model: the student; its passes are in the precision of the context.
        device: where it is.

    Raises:
        EngineError: an answer failed, or its log-probabilities are others.
    """
    prompts = _prompts(model)
    requests = [GenRequest(at, ids, 1, Sampling(0.0, 4), 0) for at, ids in enumerate(prompts)]
    if not all(np.isfinite(_logprobs(model, ids, ids[1:], device)).all() for ids in prompts):
        return  # broken weights are no matter of the cache: sampling tells
    try:
        outputs = list(engine.generate(requests))
        gap = max(_gap(model, prompts[output.group_id], output, device) for output in outputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as e:
        # How transformers says no depends on what the model lacks; after a start that went well
        # these are mistakes, and keep their traceback.
        raise EngineError(f"a short answer failed ({in_a_line(e)})") from e
    is_coarse = torch.is_autocast_enabled(device.type)
    limit = _COARSE if is_coarse else _TOLERANCE.get(model.dtype, _COARSE)
    if not gap <= limit:
        raise EngineError(
            f"its log-probabilities are {gap:.1e} nats off a whole pass (over {limit:.0e})"
        )


def require_windows(
    config: PreTrainedConfig, asked: Sequence[int | None], *, longest_sequence: int | None
) -> None:
    """Raises EngineError where layers see less than they get and do not ask for their window.

    The short answers above may be too short to show it.

    Args:
        config: of the student.
        asked: the windows that `windows_noted` had from decode steps.
        longest_sequence: most tokens of a prompt with its response, None where it is not known.
    """
    if not keeps_windows(config, asked, max_tokens=longest_sequence):
        most = "any number" if longest_sequence is None else longest_sequence
        raise EngineError(
            f"its layers see {sliding_window(config)} tokens in a way of their own, and sequences "
            f"have up to {most}"
        )


def _prompts(model: PreTrainedModel) -> list[Ids]:
    embeddings: Any = model.get_input_embeddings()
    random = np.random.default_rng(0)
    size = embeddings.num_embeddings
    return [random.integers(size, size=length).astype(np.int32) for length in _LENGTHS]


def _gap(model: PreTrainedModel, prompt: Ids, output: GenOutput, device: torch.device) -> float:
    ids = output.response.ids
    expected = _logprobs(model, np.concatenate([prompt, ids]), ids, device)
    assert output.logprobs is not None
    return float(np.abs(expected - output.logprobs).max())


def _logprobs(model: Any, sequence: Ids, last: NDArray[np.int32], device: torch.device) -> Logprobs:
    """Of the last tokens of a sequence, at temperature 1."""
    row = torch.from_numpy(sequence.astype(np.int64)).to(device)
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, -len(last) - 1 : -1]
    chosen = logits.float().log_softmax(-1).gather(-1, row[len(row) - len(last) :, None])
    return chosen[:, 0].cpu().numpy()
