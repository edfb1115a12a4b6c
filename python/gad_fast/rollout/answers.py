"""Prompts of a file, answered by a model into a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from gad_fast.config import GenerateSettings
from gad_fast.data.reading import read_prompts
from gad_fast.errors import ConfigError
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.records import Message
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import (
    Capacity,
    FinishReason,
    GenOutput,
    GenRequest,
    RolloutEngine,
    Sampling,
)
from gad_fast.rollout.making import start_engine
from gad_fast.rollout.requests import shared_sampling
from gad_fast.text import TextCodec


@dataclass(frozen=True, slots=True)
class Report:
    """What was sampled."""

    num_answers: int
    num_tokens: int
    seconds: float


def answer(source: str, settings: GenerateSettings, *, say: Callable[[str], None]) -> Report:
    """Answers each prompt `n` times; writes a line for it as soon as its answers are there.

    Lines are in the order in which prompts are done, `index` being the prompt's own. The file has
    its name when it is whole; until then its lines are in `OUTPUT.part`.

    Args:
        source: folder or Hub id of the model.
        settings: what is asked for.
        say: tells the user which engine answers, if not the one that was asked for.

    Raises:
        GadFastError: the output is there, or the model, the prompts or a setting do not fit.
    """
    _require_free(settings.output)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    codec = TextCodec.from_pretrained(source)
    prompts = read_prompts(settings.prompts, settings.prompt_column)
    requests = _requests(prompts, settings, codec)
    engine = _engine(source, settings, codec, requests, say)
    started = time.perf_counter()
    lines = _lines(engine.generate(requests), prompts, settings, codec)
    num_tokens = _write(settings.output, lines)
    engine.close()
    num_answers = settings.n * len(requests)
    return Report(num_answers, num_tokens, time.perf_counter() - started)


def _require_free(output: Path) -> None:
    if output.suffix != ".jsonl":
        raise ConfigError(f"output must end in .jsonl, got {output}")
    for path in (output, _part(output)):
        if path.exists():
            raise ConfigError(f"{path} is there already (choose another name, or remove it)")
    if not output.parent.is_dir():
        raise ConfigError(f"the folder of {output} is not there (make it first)")


def _requests(
    prompts: Sequence[list[Message]], settings: GenerateSettings, codec: TextCodec
) -> list[GenRequest]:
    sampling = Sampling(
        settings.temperature, settings.max_tokens, settings.top_k, settings.top_p, settings.stop
    )
    encoded = codec.encode_chats(prompts, add_generation_prompt=True)
    return [
        GenRequest(index, ids, settings.n, sampling, settings.seed)
        for index, ids in enumerate(encoded)
    ]


def _engine(
    source: str,
    settings: GenerateSettings,
    codec: TextCodec,
    requests: Sequence[GenRequest],
    say: Callable[[str], None],
) -> RolloutEngine:
    precision = Precision(settings.hardware)
    model = load_causal_lm(source, dtype=settings.dtype, device=precision.device)
    shared_sampling(model, requests)
    longest = max(len(request.prompt_ids) for request in requests) + settings.max_tokens
    return start_engine(
        settings.engine,
        model,
        precision,
        endings=Endings(codec.end_id, codec.decode_stream),
        capacity=Capacity(settings.max_sequences, longest_sequence=longest),
        say=say,
    )


def _lines(
    outputs: Iterable[GenOutput],
    prompts: Sequence[list[Message]],
    settings: GenerateSettings,
    codec: TextCodec,
) -> Iterator[dict[str, Any]]:
    """A line for each prompt whose answers are complete."""
    waiting: dict[int, list[GenOutput]] = {}
    for output in outputs:
        group = waiting.setdefault(output.group_id, [])
        group.append(output)
        if len(group) == settings.n:
            del waiting[output.group_id]
            group.sort(key=lambda output: output.rollout_index)
            yield {
                "index": output.group_id,
                "messages": prompts[output.group_id],
                "answers": [_answer(output, settings, codec) for output in group],
            }


def _answer(output: GenOutput, settings: GenerateSettings, codec: TextCodec) -> dict[str, Any]:
    text = codec.decode_stream(settings.stop)
    pieces = [text.push(token) for token in output.response.ids.tolist()]
    logprobs = output.logprobs
    return {
        "text": "".join(pieces) + text.finish(),
        "finish_reason": FinishReason(output.finish_reason).value,
        "num_tokens": len(output.response),
        "logprob": None if logprobs is None else float(logprobs.sum(dtype="float64")),
    }


def _write(output: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Writes the lines; gives the number of tokens in them."""
    part, num_tokens = _part(output), 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                num_tokens += sum(answer["num_tokens"] for answer in line["answers"])
            os.fsync(file.fileno())
    except BaseException:
        if part.exists() and part.stat().st_size == 0:  # nothing to keep, and in the way next time
            part.unlink()
        raise
    part.rename(output)
    return num_tokens


def _part(output: Path) -> Path:
    return output.with_name(output.name + ".part")
