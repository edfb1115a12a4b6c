"""The engine that a recipe names, made ready; nothing else knows the engines by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from gad_fast.errors import ConfigError, EngineError
from gad_fast.models.loading import Precision
from gad_fast.rollout.continuous import ContinuousEngine
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, RolloutEngine
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.rollout.static.engine import StaticEngine

ENGINES: dict[str, Callable[..., Any]] = {
    "static": StaticEngine,
    "continuous": ContinuousEngine,
    "reference": ReferenceEngine,
}
"""Fastest first: an engine that cannot take a model leaves it to the next."""


def start_engine(
    name: str,
    model: PreTrainedModel,
    precision: Precision,
    *,
    endings: Endings,
    capacity: Capacity,
    say: Callable[[str], None],
) -> RolloutEngine:
    """The engine of that name, or the next that takes the model.

    Args:
        name: one of `ENGINES`.
        model: the student, whose weights are shared.
        precision: that of the trainer's forward passes.
        endings: where responses end.
        capacity: how much may be sampled at once.
        say: tells the user why it is another engine.

    Raises:
        ConfigError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}, allowed: {', '.join(ENGINES)}")
    names = list(ENGINES)
    *tried, last = names[names.index(name) :]
    for candidate, following in zip(tried, names[names.index(name) + 1 :], strict=True):
        engine = ENGINES[candidate](model, precision, endings=endings, capacity=capacity)
        try:
            engine.start()
        except EngineError as error:
            kind = type(model).__name__
            say(f"the {candidate} engine cannot take {kind}, so {following} is next: {error}")
            continue
        return engine
    engine = ENGINES[last](model, precision, endings=endings, capacity=capacity)
    engine.start()
    return engine
