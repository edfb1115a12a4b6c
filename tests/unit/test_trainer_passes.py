"""Every way to do a step's passes gives the same gradients: what is compared is time alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from gad_fast.bench.step import Work, set_up
from gad_fast.bench.trainer_passes import VARIANTS, Table, Variant
from gad_fast.game.optim import PlayerOptimizer

WORK = Work(prompts=3, group_size=4, prompt_tokens=5, response_tokens=6, tokens_per_micro_batch=80)


def gradients_of_step(
    folder: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Tensor]]:
    """What reaches the optimizers, by player."""
    torch.manual_seed(0)
    table: Table = set_up(str(folder), WORK, "float32", variant)
    table.padded_rows = 5
    found: dict[str, list[Tensor]] = {}
    parameters = {
        "student": list(table.student.parameters()),
        "discriminator": list(table.discriminator.parameters()),
    }

    def note(self: PlayerOptimizer, loss: float) -> float:
        del loss
        gradients = [p.grad for p in parameters[self.player] if p.grad is not None]
        found[self.player] = [gradient.clone() for gradient in gradients]
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(PlayerOptimizer, "update", note)
        assert list(variant.step(table)) == ["discriminator", "student"]
    return found


def distance(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> float:
    return max(
        float((a - e).abs().max() / e.abs().max())
        for player in ("student", "discriminator")
        for a, e in zip(found[player], expected[player], strict=True)
    )


def test_each_variant_updates_with_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_student(tmp_path / "student", tie_word_embeddings=True)
    expected = gradients_of_step(tmp_path / "student", VARIANTS["official"], monkeypatch)
    # Compiled layers are compared in test_layers.py, where a compiler is.
    for name in VARIANTS.keys() - {"official", "compiled layers"}:
        found = gradients_of_step(tmp_path / "student", VARIANTS[name], monkeypatch)
        # At the first step the student is its reference, and the KL term has no gradient.
        assert distance(found, expected) < 2e-5, name
