"""What went wrong while sampling, in the engine's words."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from gad_fast.errors import EngineError
from gad_fast.records import Logprobs


def in_a_line(error: BaseException) -> str:
    """What an error of a library says first; some append a whole configuration."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def told_as_engine_error(doing: str, *, num_rows: int) -> Generator[None]:
    """Raises EngineError for a failure of torch; other errors of a caller between outputs pass.

    Args:
        doing: what failed, as the message begins.
        num_rows: rollouts at once, of which half may fit where memory has run out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"out of memory with {num_rows} rollouts at once: {in_a_line(error)} "
            f"(set max_sequences = {max(1, num_rows // 2)})"
        ) from error
    except EngineError:
        raise
    except RuntimeError as error:
        raise EngineError(f"{doing} failed: {in_a_line(error)}") from error


def finite(logprobs: Tensor) -> Logprobs:
    """Log-probabilities that have been sampled at; raises EngineError unless they are numbers."""
    values = logprobs.cpu().numpy()
    if not np.isfinite(values).all():
        raise EngineError(
            "the student's logits are not finite (a training step has broken its weights: lower "
            "the learning rate, or start from an earlier checkpoint)"
        )
    return values
