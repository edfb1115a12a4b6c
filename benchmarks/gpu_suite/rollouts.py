"""Rollouts of random weights by each engine: tokens a second, and a decode step over its floor.

A decode step reads all weights and the keys and values so far, whatever computes it: their bytes at
the bandwidth of this run are its floor. The weights are random, so that no rollout ends early, and
`generate` loses nothing to rows that have; where they do, `benchmarks/rollouts.py` measures it.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from gad_fast.config import HardwareSettings
from gad_fast.models.loading import Precision
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, GenRequest, RolloutEngine, Sampling
from gad_fast.rollout.making import ENGINES
from gpu_suite.cases import Case, Results, Row
from gpu_suite.ceilings import Ceilings, ceilings_of
from gpu_suite.random_models import codec_of_two_tokens, random_examples, random_model
from gpu_suite.scale import RolloutSize, Scale
from gpu_suite.timing import synchronize

TEMPERATURE = 0.8


def cases(scale: Scale, results: Results) -> list[Case]:
    """Each engine on each model; ours first, as what no time is left for is skipped."""
    ceilings = ceilings_of(results)
    return [
        Case(f"{size.name} {engine}", functools.partial(_rollouts, engine, size, scale, ceilings))
        for engine in ENGINES
        for size in scale.rollouts
    ]


def floor_bytes(model: Any, size: RolloutSize) -> int:
    """What a decode step must read: weights, keys and values, at half of the response."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    a_token = 2 * config.num_hidden_layers * width * model.dtype.itemsize
    return weights + size.rows * (size.prompt_tokens + size.response_tokens // 2) * a_token


def _rollouts(name: str, size: RolloutSize, scale: Scale, ceilings: Ceilings) -> list[Row]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    precision = Precision(HardwareSettings(device=scale.device, compute_dtype="weights"))
    torch.manual_seed(0)
    longest = size.prompt_tokens + size.response_tokens
    model = random_model(Qwen2ForCausalLM, size.model, precision, longest)
    model = model.to(getattr(torch, scale.dtype))
    engine: RolloutEngine = ENGINES[name](
        model,
        precision,
        endings=Endings(codec_of_two_tokens().end_id),
        capacity=Capacity(size.rows, longest_sequence=longest),
    )
    short = size.response_tokens // 8
    _sample(engine, size, scale, short)  # what is loaded once
    (_, short_seconds), (tokens, seconds) = (
        _sample(engine, size, scale, response_tokens)
        for response_tokens in (short, size.response_tokens)
    )
    floor_ms = ceilings.milliseconds(num_bytes=floor_bytes(model, size))
    decode_ms = (seconds - short_seconds) / (size.response_tokens - short) * 1e3
    return [
        {
            "model": size.name,
            "engine": name,
            "rows": size.rows,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "decode_ms": decode_ms,
            "floor_ms": floor_ms,
            "ratio": decode_ms / floor_ms,
        }
    ]


def _sample(
    engine: RolloutEngine, size: RolloutSize, scale: Scale, response_tokens: int
) -> tuple[int, float]:
    """Tokens, and seconds."""
    examples = random_examples(
        size.model, size.prompts, prompt_tokens=size.prompt_tokens, response_tokens=1
    )
    sampling = Sampling(TEMPERATURE, response_tokens)
    requests = [
        GenRequest(index, example.prompt_ids, size.group_size, sampling, seed=0)
        for index, example in enumerate(examples)
    ]
    synchronize(scale.device)
    start = time.perf_counter()
    tokens = sum(len(output.response) for output in engine.generate(requests))
    synchronize(scale.device)
    return tokens, time.perf_counter() - start
