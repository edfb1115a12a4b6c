"""The work of a step: how many prompts, rollouts and tokens, and the texts themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gad_fast.records import Message

TEMPERATURE = 0.8
KL_COEF = 0.001
LEARNING_RATE = 1e-6
ROWS = Path(__file__).parents[2] / "data" / "quickstart.jsonl"


@dataclass(frozen=True, slots=True)
class Size:
    """What one step works on."""

    prompts: int
    group_size: int
    response_tokens: int
    tokens_per_micro_batch: int
    """Of this package; TRL takes sequences, at most 16 at once."""

    @property
    def name(self) -> str:
        """Prompts x rollouts x tokens."""
        return f"{self.prompts}x{self.group_size}x{self.response_tokens}"

    @property
    def group_tokens(self) -> int:
        """Most tokens of a prompt with its rollouts and the teacher's response."""
        return MAX_PROMPT_TOKENS + (self.group_size + 1) * self.response_tokens


MAX_PROMPT_TOKENS = 128
SIZES = {
    size.name: size for size in (Size(2, 2, 8, 1024), Size(4, 4, 64, 2048), Size(8, 8, 128, 4096))
}


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with the teacher's response."""

    messages: list[Message]
    teacher_response: str


def rows(size: Size, num_steps: int) -> list[Row]:
    """Rows enough for some steps: those of the longest answers, which students do not cut short."""
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    longest = sorted(lines, key=lambda line: -len(line["teacher_response"]))
    return [
        Row([{"role": "user", "content": line["prompt"]}], line["teacher_response"])
        for line in longest[: size.prompts * num_steps]
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one side's steps cost."""

    seconds: dict[str, float]
    """Median over the steps after the first, by phase: rollout, discriminator, student, step."""
    tokens: float
    """Mean number of response tokens of a step."""
    peak_gib: float
    """Most resident memory of the process, Python and libraries included."""
