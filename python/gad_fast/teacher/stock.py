"""What of a collection is there, and what is still to be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from gad_fast.config import CollectRecipe
from gad_fast.errors import CacheError
from gad_fast.teacher.budget import Usage, most_of, used_by
from gad_fast.teacher.cache import TeacherCache
from gad_fast.teacher.questions import Chat, questions
from gad_fast.teacher.records import TeacherRequest
from gad_fast.teacher.rejections import Rejections


@dataclass(frozen=True, slots=True)
class Stock:
    """A collection as a start finds it."""

    pending: dict[str, list[TeacherRequest]]
    """By teacher, what is neither in the cache nor rejected, in the order of the prompts."""
    num_kept: int
    """Responses in the cache."""
    num_rejected: int
    """Requests that an earlier start found rejected."""
    spent: Usage
    """What the responses in the cache have used."""

    @property
    def num_pending(self) -> int:
        """Requests to send."""
        return sum(map(len, self.pending.values()))

    @property
    def num_wanted(self) -> int:
        """Responses that the recipe asks for."""
        return self.num_kept + self.num_rejected + self.num_pending


@dataclass(frozen=True, slots=True)
class Job:
    """A collection that is about to go on: its recipe, where things are kept, what is there."""

    recipe: CollectRecipe
    cache: TeacherCache
    rejections: Rejections
    stock: Stock


@contextlib.contextmanager
def open_job(recipe: CollectRecipe, prompts: Sequence[Chat]) -> Generator[Job]:
    """A job, which holds the cache until it is left.

    Raises:
        CacheError: the cache cannot be opened, or another process writes to it.
    """
    folder = recipe.cache.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot make the folder {folder}: {error.strerror}") from error
    with TeacherCache.open(recipe.cache) as cache:
        rejections = Rejections(recipe.cache)
        yield Job(recipe, cache, rejections, take_stock(recipe, prompts, cache, rejections))


def inspect(recipe: CollectRecipe, prompts: Sequence[Chat]) -> Stock:
    """What a start would find; writes nothing, and another process may be collecting.

    Raises:
        CacheError: the cache cannot be read.
    """
    rejections = Rejections(recipe.cache)
    if not recipe.cache.exists():
        return take_stock(recipe, prompts, None, rejections)
    with TeacherCache.open(recipe.cache, read_only=True) as cache:
        return take_stock(recipe, prompts, cache, rejections)


def take_stock(
    recipe: CollectRecipe,
    prompts: Sequence[Chat],
    cache: TeacherCache | None,
    rejections: Rejections,
) -> Stock:
    """Compares what the recipe asks for with what is there; no cache holds nothing."""
    pending: dict[str, list[TeacherRequest]] = {name: [] for name in recipe.teachers}
    num_kept = num_rejected = 0
    spent = Usage()
    for question in questions(recipe, prompts):
        request = question.request
        response = None if cache is None else cache.get(request)
        if response is not None:
            num_kept += 1
            spent += used_by(response, most_of(request, recipe.teachers[question.teacher]))
        elif request in rejections:
            num_rejected += 1
        else:
            pending[question.teacher].append(request)
    return Stock(pending, num_kept, num_rejected, spent)
