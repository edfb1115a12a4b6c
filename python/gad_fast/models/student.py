"""The student: the language model that is being distilled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gad_fast import kernels
from gad_fast.config import StudentSettings
from gad_fast.models.batch import PaddedBatch
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.text import TextCodec


def load_student(settings: StudentSettings, precision: Precision) -> Student:
    """The student that a recipe names; raises ModelError when it cannot be loaded."""
    model = load_causal_lm(settings.model, dtype=settings.dtype, device=precision.device)
    return Student(model, precision)


class Student(nn.Module):
    """A causal language model that gives the log-probabilities of responses."""

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def response_logprobs(self, batch: PaddedBatch, *, temperature: float) -> Tensor:
        """Log-probability of each response token, the end token included.

        Args:
            batch: N sequences.
            temperature: divides the logits; 1 for imitation, that of the rollouts in the game.

        Returns:
            Float32 [T], the responses laid end to end.
        """
        num_columns = batch.response_ids.shape[1]
        with self.precision.autocast():
            # The column before the first response token predicts it; the last predicts nothing.
            output: Any = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                logits_to_keep=num_columns + 1,
                use_cache=False,
            )
        mask = batch.response_mask
        logits = output.logits[:, :-1][mask]  # [T, V]
        return kernels.token_logprobs(logits, batch.response_ids[mask], temperature=temperature)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.precision.device

    def save(self, folder: Path, codec: TextCodec) -> None:
        """Writes a folder that `AutoModelForCausalLM` loads, with its tokenizer."""
        self.model.save_pretrained(folder)
        codec.tokenizer.save_pretrained(folder)

    def frozen_copy(self) -> Student:
        """The student as it is, for the KL reference."""
        return Student(copy.deepcopy(self.model).requires_grad_(False), self.precision)
