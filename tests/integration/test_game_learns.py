"""A whole game that must learn, through `train()`, where imitation cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gad_in_200_lines as pairs
import pairs as files
from gad_fast import Recipe, train

LIMITS = {"max_prompt_tokens": 4, "max_response_tokens": pairs.LENGTH + 1}


def values(folder: Path, name: str, student: Path, **sections: Any) -> dict[str, Any]:
    return {
        "name": name,
        "output": folder / name,
        "student": {"model": str(student)},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "keep_duplicates": True,  # how often a sentence comes is what is to be learned
            **LIMITS,
        },
        "rollout": {"group_size": 8, "temperature": 1.0},
        "optimizer": {"max_grad_norm": 1.0},
        "run": {"checkpoint_every_steps": 10_000, "log_every": 100, "samples_per_step": 0},
        "hardware": {"device": "cpu", "compute_dtype": "float32"},
        **sections,
    }


def evaluate(folder: Path, temperature: float = 1.0) -> tuple[float, float]:
    student = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    return pairs.evaluate(student, temperature)


@pytest.mark.timeout(300)
def test_gad_learns_what_imitation_at_no_temperature_can(tmp_path: Path) -> None:
    torch.manual_seed(0)
    files.save_model(pairs.make_student(), tmp_path / "student")
    pairs.make_discriminator().save_pretrained(tmp_path / "discriminator")
    files.write_teacher(tmp_path / "train.jsonl", 20_000, seed=0)
    files.write_teacher(tmp_path / "validation.jsonl", 64, seed=1)

    imitation = {"peak": 3e-3, "schedule": "linear", "final_fraction": 0.1}
    seqkd = values(
        tmp_path,
        "seqkd",
        tmp_path / "student",
        method="seqkd",
        batch={"prompts_per_step": 64},
        warmup={"steps": 1000, "student": imitation},
        game={"steps": 0},
    )
    train(Recipe.from_values(seqkd))

    rate = {"peak": 3e-4, "schedule": "linear", "final_fraction": 0.05}
    gad = values(
        tmp_path,
        "gad",
        tmp_path / "seqkd" / "student",
        discriminator={"model": str(tmp_path / "discriminator")},
        batch={"prompts_per_step": 16},
        warmup={"steps": 150, "discriminator_only_steps": 150, "discriminator": {"peak": 3e-3}},
        game={
            "steps": 500,
            "student": rate,
            "discriminator": {"peak": 3e-3},
            "advantage_scale": "none",
        },
    )
    train(Recipe.from_values(gad))

    imitated = {t: evaluate(tmp_path / "seqkd" / "student", t) for t in (1.0, 0.8, 0.6, 0.4)}
    validity, reverse_kl = evaluate(tmp_path / "gad" / "student")
    print(f"SeqKD {imitated}; GAD {validity:.3f} {reverse_kl:.2f}")  # noqa: T201
    assert 0.28 < imitated[1.0][0] < 0.40
    assert all(valid < 0.50 for valid, _ in imitated.values())
    assert validity > 0.75
    assert reverse_kl < 2 / 3 * min(kl for _, kl in imitated.values())
