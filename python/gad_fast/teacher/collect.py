"""A collection from prompts to a durable cache: never a response lost, never one bought twice."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gad_fast.config import CollectRecipe
from gad_fast.errors import Interrupted
from gad_fast.teacher.collector import Collector
from gad_fast.teacher.control import Control
from gad_fast.teacher.progress import ProgressScreen, describe
from gad_fast.teacher.questions import Chat
from gad_fast.teacher.records import TeacherRequest
from gad_fast.teacher.stock import Job, open_job
from gad_fast.teacher.tally import Tally


@dataclass(frozen=True, slots=True)
class Collection:
    """What came of a start."""

    cache: Path
    """Where the responses are."""
    rejected: Path
    """Where the requests are that will never succeed; not there if there are none."""
    tally: Tally
    """Counts."""
    stopped: str | None
    """Why it ended before everything was asked, or None."""

    def __str__(self) -> str:
        tally, num_there = self.tally, self.tally.num_kept + self.tally.num_new
        lines = [
            f"{num_there} of {tally.num_wanted} responses are in {self.cache}, "
            f"{tally.num_new} of them new  {describe(tally)}"
        ]
        if num_rejected := tally.num_rejected_before + tally.num_rejected:
            lines.append(f"{num_rejected} prompts were rejected; why is in {self.rejected}")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        if tally.num_left:
            lines.append(f"{tally.num_left} are left; the same command asks for them")
        return "\n".join(lines)


def collect(
    recipe: CollectRecipe, prompts: Sequence[Chat], *, console: Console | None = None
) -> Collection:
    """Asks for every response that the cache has not.

    Args:
        recipe: what is asked, of whom, and how fast.
        prompts: chats; equal ones are asked once.
        console: where progress is shown; by default the terminal.

    Returns:
        What came of it; also if the budget ended it.

    Raises:
        CacheLockedError: another process collects into the cache.
        TeacherError: no key, no access, no such model, or too many requests failed; what was
            answered is in the cache.
        Interrupted: Ctrl-C; open requests were finished.
    """
    with open_job(recipe, prompts) as job:
        return settle(job, job.stock.pending, console)


def settle(
    job: Job, requests: Mapping[str, list[TeacherRequest]], console: Console | None
) -> Collection:
    """Settles some of what is pending, by teacher; raises as `collect`."""
    stock = job.stock
    tally = Tally(stock.num_wanted, stock.num_kept, stock.num_rejected)
    try:
        control = asyncio.run(_settle(job, requests, tally, console))
    except asyncio.CancelledError:
        raise Interrupted(f"left at once; what was answered is in {job.cache.path}") from None
    if control.error is not None:
        raise control.error
    collection = Collection(job.cache.path, job.rejections.path, tally, control.reason)
    if control.is_interrupted:
        raise Interrupted(str(collection))
    return collection


async def _settle(
    job: Job,
    requests: Mapping[str, list[TeacherRequest]],
    tally: Tally,
    console: Console | None,
) -> Control:
    collector = Collector(job, tally)
    with ProgressScreen(tally, console) as screen, collector.control.on_interrupt():
        showing = asyncio.create_task(screen.refresh_for_ever())
        try:
            await collector.collect(requests)
        finally:
            showing.cancel()
            await collector.close()
    return collector.control
