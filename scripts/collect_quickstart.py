"""Collect the quickstart answers from a local teacher model.

    python scripts/collect_quickstart.py models/Qwen2.5-Coder-0.5B-Instruct

Asks the teacher every prompt of `data/quickstart_prompts.jsonl` and writes the answers to
`data/quickstart.jsonl`, one object a line: prompt, category, teacher_response. Only answers that
the teacher ended by itself are kept; cut and empty ones are counted and left out. The default is
greedy decoding, which suits so small a teacher better than sampling (0.7 makes it wander).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
SYSTEM_PROMPT = (
    "You are a helpful assistant. "
    "Give a brief, direct answer of one or two short sentences in plain text."
)


@dataclass(frozen=True)
class Answer:
    """What the teacher said to one prompt, its length in tokens, and whether it came to an end."""

    text: str
    tokens: int
    ended: bool


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a JSON Lines file, readable without escapes, in one go."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def load(folder: Path) -> tuple[Any, Any]:
    """Load the teacher in bfloat16 and its tokenizer, which pads on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    )
    return model.eval(), tokenizer


def answer_batch(
    model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace
) -> list[Answer]:
    """Ask one batch of prompts, each in a conversation of its own."""
    chats = [
        [{"role": "system", "content": args.system_prompt}, {"role": "user", "content": prompt}]
        for prompt in prompts
    ]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        sampling["top_k"] = 0
    else:
        sampling = {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(**inputs, **sampling, max_new_tokens=args.max_new_tokens)
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop if isinstance(stop, list) else [stop])
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((at for at, token in enumerate(row) if token in stop_ids), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
        answers.append(Answer(text, len(row[:end]), end is not None))
    return answers


def ask_all(
    model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace
) -> list[Answer]:
    """Ask all prompts, batched by similar length to save padding; answers come in their order."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    answers: dict[int, Answer] = {}
    start = time.monotonic()
    for first in range(0, len(order), args.batch_size):
        batch = order[first : first + args.batch_size]
        replies = answer_batch(model, tokenizer, [prompts[at] for at in batch], args)
        answers.update(zip(batch, replies, strict=True))
        print(f"{len(answers)}/{len(prompts)} in {time.monotonic() - start:.0f} s", flush=True)
    return [answers[at] for at in range(len(prompts))]


def report(rows: list[dict[str, str]], answers: list[Answer]) -> None:
    """Print how many answers were kept, cut and empty, and how long the kept ones are."""
    kept = [answer for answer in answers if answer.ended and answer.text]
    empty = sum(answer.ended and not answer.text for answer in answers)
    cut = sum(not answer.ended for answer in answers)
    print(f"kept {len(kept)}, cut {cut}, empty {empty}")
    lost = Counter(
        row["category"]
        for row, answer in zip(rows, answers, strict=True)
        if not (answer.ended and answer.text)
    )
    print("left out by category:", dict(lost.most_common()) or "none")
    lengths = torch.tensor([answer.tokens for answer in kept], dtype=torch.float32)
    if len(lengths):
        parts = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
        values = torch.quantile(lengths, torch.tensor(parts)).tolist()
        shown = ", ".join(
            f"{part:.0%} {value:.0f}" for part, value in zip(parts, values, strict=True)
        )
        print(f"length in teacher tokens: {shown}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path, help="folder of the teacher model")
    parser.add_argument("--prompts", type=Path, default=DATA / "quickstart_prompts.jsonl")
    parser.add_argument("--out", type=Path, default=DATA / "quickstart.jsonl")
    parser.add_argument("--system-prompt", default=SYSTEM_PROMPT)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 means greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--every", type=int, default=1, help="ask only every n-th prompt, for a try"
    )
    return parser.parse_args()


def main() -> int:
    """Collect the answers, write the kept ones and print the counts."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = read_rows(args.prompts)[:: args.every]
    model, tokenizer = load(args.teacher)
    answers = ask_all(model, tokenizer, [row["prompt"] for row in rows], args)
    kept = [
        {"prompt": row["prompt"], "category": row["category"], "teacher_response": answer.text}
        for row, answer in zip(rows, answers, strict=True)
        if answer.ended and answer.text
    ]
    write_rows(args.out, kept)
    report(rows, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
