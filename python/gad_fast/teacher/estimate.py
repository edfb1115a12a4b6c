"""What a collection will cost, told from a sample of it that is asked and kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from gad_fast.config import CollectRecipe, TeacherSettings
from gad_fast.teacher.collect import Collection, settle
from gad_fast.teacher.questions import Chat
from gad_fast.teacher.records import TeacherRequest, TeacherResponse
from gad_fast.teacher.stock import Job, open_job


@dataclass(frozen=True, slots=True)
class TeacherEstimate:
    """What one teacher's open requests will use, the sample not included."""

    teacher: str
    """What the recipe calls it."""
    num_sampled: int
    """Responses that the figures come from."""
    num_requests: int
    """Requests that are left."""
    tokens: float | None
    """Tokens of prompts and responses; None where the server does not count them."""
    tokens_error: float
    """Standard error of `tokens`, from the spread of the sample."""
    cost: float | None
    """In the currency of the prices, where the recipe has them."""
    seconds: float | None
    """At the sample's latency and the recipe's limits; None without a sample."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A sample, and what follows from it."""

    sample: Collection
    teachers: list[TeacherEstimate]


def estimate(
    recipe: CollectRecipe, prompts: Sequence[Chat], *, console: Console | None = None
) -> Estimate:
    """Asks `estimate_prompts` requests, spread over the prompts, and extrapolates.

    Their responses stay in the cache, so that nothing is bought twice. Teachers in batch mode are
    asked by chat, which does not take a day. Raises as `collect`.
    """
    by_chat = {
        name: teacher.model_copy(update={"mode": "chat"})
        for name, teacher in recipe.teachers.items()
    }
    with open_job(recipe.model_copy(update={"teachers": by_chat}), prompts) as job:
        sample = _sample(job.stock.pending, recipe.estimate_prompts)
        collection = settle(job, sample, console)
        tally = collection.tally
        latency = tally.seconds_asking / tally.num_new if tally.num_new else None
        return Estimate(
            collection,
            [_extrapolate(job, name, sample[name], latency) for name in recipe.teachers],
        )


def _sample(
    pending: dict[str, list[TeacherRequest]], count: int
) -> dict[str, list[TeacherRequest]]:
    """Every n-th request of each teacher, two of each at least."""
    total = sum(map(len, pending.values()))
    stride = max(1, total // count)
    return {
        name: requests[:: max(1, min(stride, len(requests) // 2))][: max(count, 2)]
        for name, requests in pending.items()
    }


def _extrapolate(
    job: Job, name: str, sample: list[TeacherRequest], latency: float | None
) -> TeacherEstimate:
    settings = job.recipe.teachers[name]
    answers = [answer for request in sample if (answer := job.cache.get(request)) is not None]
    num_left = len(job.stock.pending[name]) - len(answers)
    sizes = [size for answer in answers if (size := _num_tokens(answer)) is not None]
    costs = [answer.cost for answer in answers if answer.cost is not None]
    tokens = statistics.fmean(sizes) * num_left if sizes else None
    spread = statistics.stdev(sizes) if len(sizes) > 1 else math.inf
    return TeacherEstimate(
        teacher=name,
        num_sampled=len(answers),
        num_requests=num_left,
        tokens=tokens,
        tokens_error=spread / math.sqrt(max(1, len(sizes))) * num_left,
        cost=statistics.fmean(costs) * num_left if costs else None,
        seconds=None if latency is None else _seconds(settings, num_left, tokens, latency),
    )


def _num_tokens(answer: TeacherResponse) -> int | None:
    if answer.num_prompt_tokens is None or answer.num_response_tokens is None:
        return None
    return answer.num_prompt_tokens + answer.num_response_tokens


def _seconds(
    settings: TeacherSettings, num_requests: int, tokens: float | None, latency: float
) -> float:
    """The longest of what latency, the request limit and the token limit ask for."""
    spans = [latency * num_requests / settings.concurrency]
    if settings.requests_per_minute is not None:
        spans.append(60 * num_requests / settings.requests_per_minute)
    if settings.tokens_per_minute is not None and tokens is not None:
        spans.append(60 * tokens / settings.tokens_per_minute)
    return max(spans)
