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
from gad_fast.models.language_head import fuse_head
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.text import TextCodec


def load_student(settings: StudentSettings, precision: Precision) -> Student:
    """The student that a recipe names; raises ModelError when it cannot be loaded."""
    model = load_causal_lm(settings.model, dtype=settings.dtype, device=precision.device)
    return Student(model, precision)


class Student(nn.Module):
    """A causal language model that gives the log-probabilities of responses and losses on them.

    Its head is replaced by one that never makes whole logits, wherever that gives the same ones;
    otherwise the model's own logits of the response tokens are taken.
    """

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.head_options = fuse_head(model)

    def response_logprobs(self, batch: PaddedBatch, *, temperature: float) -> Tensor:
        """Log-probability of each response token, the end token included.

        Args:
            batch: N sequences.
            temperature: divides the logits; 1 for imitation, that of the rollouts in the game.

        Returns:
            Float32 [T], the responses laid end to end.
        """
        with self.precision.autocast():
            if self.head_options is None:
                logits, labels = self._logits(batch), _labels(batch)
                return kernels.token_logprobs(logits, labels, temperature=temperature)
            return self._head(batch, temperature=temperature)

    def policy_loss(
        self, batch: PaddedBatch, advantages: Tensor, *, temperature: float, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, strictly on-policy, and what to log of it.

        One update is made for each batch of rollouts, so the ratio to the sampling policy is 1.

        Args:
            batch: N sequences.
            advantages: Float [T], of each response token, the responses laid end to end.
            temperature: that of the rollouts.
            options: of `kernels.policy_loss`.
        """
        with self.precision.autocast():
            if self.head_options is not None:
                return self._head(batch, advantages=advantages, temperature=temperature, **options)
            logits, labels = self._logits(batch), _labels(batch)
            return kernels.policy_loss_from_logits(
                logits, labels, None, advantages, temperature=temperature, **options
            )

    def imitation_loss(self, batch: PaddedBatch, *, num_tokens: int) -> Tensor:
        """Cross-entropy of the responses, summed over them and divided by `num_tokens`.

        It is the policy loss of a token that was as good as it can be told: advantage 1.

        Source: paper section 2.2 (warm-up).
        """
        ones = torch.ones(int(batch.response_mask.sum()), device=self.device)
        loss, _ = self.policy_loss(
            batch, ones, temperature=1.0, loss_type="reinforce", num_tokens=num_tokens
        )
        return loss

    def _head(self, batch: PaddedBatch, **options: Any) -> Any:
        assert self.head_options is not None
        output: Any = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        # The column before the first response token predicts it; the last predicts nothing.
        hidden = output.last_hidden_state[:, batch.prompt_width - 1 : -1]
        head: Any = self.model.get_output_embeddings()
        return head(
            hidden[batch.response_mask],
            _labels(batch),
            **self.head_options.as_keywords(),
            **options,
        )

    def _logits(self, batch: PaddedBatch) -> Tensor:
        output: Any = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=batch.response_ids.shape[1] + 1,
            use_cache=False,
        )
        return output.logits[:, :-1][batch.response_mask]  # [T, V]

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


def _labels(batch: PaddedBatch) -> Tensor:
    """The response tokens, laid end to end."""
    return batch.response_ids[batch.response_mask]
