"""Prompts whose responses are asked for while training, a few steps ahead of their use."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace

from gad_fast.config import CollectRecipe, DataSettings
from gad_fast.data.bought import is_usable, join_cache
from gad_fast.data.prompt_set import BatchStream, PromptSet, encode_examples, require_examples
from gad_fast.errors import DataError
from gad_fast.records import EncodedExample
from gad_fast.teacher.collect import collect
from gad_fast.teacher.live import Coming, LiveTeacher
from gad_fast.text import TextCodec


@dataclass(frozen=True, slots=True)
class LiveData:
    """The data of a run, with responses that are there or coming."""

    prompts: PromptSet
    """Its validation part has all responses."""
    batches: Iterable[list[EncodedExample]]
    """As the stream gives them, prompts without a usable response left out."""


@contextlib.contextmanager
def ask_while_training(
    settings: DataSettings, prompts: PromptSet, stream: BatchStream, codec: TextCodec
) -> Generator[LiveData]:
    """Collects the validation part at once, and the training part just in time.

    Args:
        settings: with `teacher = "collect:..."`.
        prompts: without responses, as `load_prompt_set` gives them for these settings.
        stream: over the training part.
        codec: the student's.

    Raises:
        TeacherError: a teacher cannot be asked, here or later when a batch is waited for.
        DataError: no response can be validated on.
        CacheLockedError: another process collects into the cache.
    """
    assert settings.teacher is not None
    recipe = CollectRecipe.from_toml(settings.teacher.removeprefix("collect:"))
    # Made first: what it refuses must be told before anything is bought.
    live = LiveTeacher(recipe, [prompt.example.messages for prompt in prompts.train])
    held_out = [prompt.example.messages for prompt in prompts.validation]
    collect(recipe, held_out)
    answered = join_cache(recipe.cache, held_out, settings.leave_out)
    validation = encode_examples(answered.examples, settings, codec)
    require_examples(validation, "validate", len(answered.examples), settings)
    with live as teacher:
        batches = _JustInTime(teacher, stream, settings, codec)
        yield LiveData(replace(prompts, validation=validation), batches)


class _JustInTime:
    """Batches of a stream, each given when its responses are there."""

    def __init__(
        self, teacher: LiveTeacher, stream: BatchStream, settings: DataSettings, codec: TextCodec
    ) -> None:
        self._teacher, self._stream, self._settings, self._codec = teacher, stream, settings, codec

    def __iter__(self) -> Iterator[list[EncodedExample]]:
        answered = self._answered()
        while True:
            yield [next(answered) for _ in range(self._stream.batch_size)]

    def _answered(self) -> Iterator[EncodedExample]:
        num_useless = 0
        for prompt, coming in self._asked():
            response = self._teacher.wait_for(coming)
            if response is None or not is_usable(response, self._settings.leave_out):
                num_useless += 1
                if num_useless == self._stream.num_examples:
                    raise DataError("the teacher gave no usable response to any training prompt")
                continue
            num_useless = 0
            example = replace(prompt.example, teacher_response=response.text)
            yield from encode_examples([example], self._settings, self._codec)

    def _asked(self) -> Iterator[tuple[EncodedExample, Coming]]:
        """Prompts in the order of the stream, each asked `steps_ahead` batches before its turn."""
        ahead: deque[tuple[EncodedExample, Coming]] = deque()
        for batch in self._stream:
            ahead.extend((prompt, self._teacher.ask(prompt.example.messages)) for prompt in batch)
            while len(ahead) > self._settings.steps_ahead * self._stream.batch_size:
                yield ahead.popleft()
