"""Steps of this package, through `train`, as a user runs them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from gad_fast import Recipe, train
from gad_fast.run.display import Display
from step_cost.measure import peak_gib
from step_cost.work import (
    KL_COEF,
    LEARNING_RATE,
    MAX_PROMPT_TOKENS,
    TEMPERATURE,
    Cost,
    Size,
    rows,
)

PHASES = ("rollout", "discriminator", "student", "step")


WAYS: dict[str, dict[str, Any]] = {
    "here": {},
    "here, a group at a time": {"is_thrifty": True},
    "here, LoRA": {"lora": {"rank": 16}},
    "here, LoRA, a group at a time": {"lora": {"rank": 16}, "is_thrifty": True},
}
"""Settings beyond those of the size: `[lora]`, and whether a pass holds one group only."""


def run(model: str, size: Size, dtype: str, num_steps: int, folder: Path, way: str) -> Cost:
    """Plays a short game.

    Args:
        model: folder of the student.
        size: what a step works on.
        dtype: of the matrix products; the weights are float32.
        num_steps: steps, the first of which is not counted.
        folder: for data and run.
        way: one of WAYS.
    """
    recipe = _recipe(model, size, dtype, num_steps, folder, WAYS[way])
    with (folder / "screen.txt").open("w") as screen:
        train(recipe, display=Display(Console(file=screen)))
    lines = [json.loads(line) for line in (recipe.output / "metrics.jsonl").open()]
    steps = [line for line in lines if line["stage"] == "game"][1:]
    seconds = {
        phase: statistics.median(line[f"{phase}_seconds"] for line in steps) for phase in PHASES
    }
    tokens = statistics.fmean(line["rollout_length"] for line in steps)
    return Cost(seconds, tokens * size.prompts * size.group_size, peak_gib())


def _recipe(
    model: str, size: Size, dtype: str, num_steps: int, folder: Path, way: dict[str, Any]
) -> Recipe:
    # One row more for the validation, which must have some.
    data = [
        {"messages": row.messages, "teacher_response": row.teacher_response}
        for row in rows(size, num_steps + 1)
    ]
    train_rows, validation_rows = data[: size.prompts * num_steps], data[-1:]
    for name, part in (("train", train_rows), ("validation", validation_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    rate = {"peak": LEARNING_RATE}
    values = {
        "name": "step",
        "output": folder / "run",
        "student": {"model": model},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_response_tokens": size.response_tokens,
        },
        "warmup": {"steps": 0},
        "game": {
            "steps": num_steps,
            "kl_coef": KL_COEF,
            "student": rate,
            "discriminator": rate,
        },
        "rollout": {"group_size": size.group_size, "temperature": TEMPERATURE},
        "batch": {
            "prompts_per_step": size.prompts,
            "tokens_per_micro_batch": (
                size.group_tokens if way.get("is_thrifty") else size.tokens_per_micro_batch
            ),
        },
        "hardware": {"compute_dtype": dtype},
        "lora": way.get("lora", {}),
    }
    return Recipe.from_values(values)
