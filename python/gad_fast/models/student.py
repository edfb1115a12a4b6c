"""The student: the language model that is being distilled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gad_fast import kernels
from gad_fast.config import Recipe
from gad_fast.models.batch import Batch, Item
from gad_fast.models.language_head import fuse_head
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.models.micro_batches import micro_batches
from gad_fast.models.saving import copy_for_saving, load_weights
from gad_fast.models.shared_prompts import can_share_prompts
from gad_fast.text import TextCodec


def load_student(recipe: Recipe, precision: Precision) -> Student:
    """The student that a recipe names; raises ModelError when it cannot be loaded."""
    settings = recipe.student
    model = load_causal_lm(settings.model, dtype=settings.dtype, device=precision.device)
    return Student(model, precision, max_tokens=recipe.data.max_tokens)


class Student(nn.Module):
    """A causal language model that gives the log-probabilities of responses and losses on them.

    Its head is replaced by one that never makes whole logits, wherever that gives the same ones;
    otherwise the model's own logits of the response tokens are taken.
    """

    def __init__(
        self, model: PreTrainedModel, precision: Precision, *, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.head_options = fuse_head(model)
        self.shares_prompts = can_share_prompts(model, max_tokens=max_tokens)

    def micro_batches(
        self, items: Sequence[Item], *, token_budget: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of responses, each with the indices of its responses among those of all items."""
        return micro_batches(
            items, token_budget=token_budget, is_shared=self.shares_prompts, device=self.device
        )

    def response_logprobs(self, batch: Batch, *, temperature: float) -> Tensor:
        """Log-probability of each response token, the end token included.

        Args:
            batch: N sequences.
            temperature: divides the logits; 1 for imitation, that of the rollouts in the game.

        Returns:
            Float32 [T], the responses laid end to end.
        """
        with self.precision.autocast():
            if self.head_options is None:
                logits, labels = self._logits(batch), batch.labels
                return kernels.token_logprobs(logits, labels, temperature=temperature)
            return self._head(batch, temperature=temperature)

    def policy_loss(
        self, batch: Batch, advantages: Tensor, *, temperature: float, **options: Any
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
            logits, labels = self._logits(batch), batch.labels
            return kernels.policy_loss_from_logits(
                logits, labels, None, advantages, temperature=temperature, **options
            )

    def imitation_loss(self, batch: Batch, *, num_tokens: int) -> Tensor:
        """Cross-entropy of the responses, summed over them and divided by `num_tokens`.

        It is the policy loss of a token that was as good as it can be told: advantage 1.

        Source: paper section 2.2 (warm-up).
        """
        ones = torch.ones(len(batch.labels), device=self.device)
        loss, _ = self.policy_loss(
            batch, ones, temperature=1.0, loss_type="reinforce", num_tokens=num_tokens
        )
        return loss

    def _head(self, batch: Batch, **options: Any) -> Any:
        assert self.head_options is not None
        output: Any = self.model.base_model(**batch.model_inputs, use_cache=False)
        head: Any = self.model.get_output_embeddings()
        return head(
            batch.predictors(output.last_hidden_state),
            batch.labels,
            **self.head_options.as_keywords(),
            **options,
        )

    def _logits(self, batch: Batch) -> Tensor:
        output: Any = self.model(**batch.model_inputs, use_cache=False)
        return batch.predictors(output.logits)  # [T, V]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.precision.device

    def save(self, folder: Path, codec: TextCodec) -> None:
        """Writes a folder that `AutoModelForCausalLM` loads, with its tokenizer."""
        self.model.save_pretrained(folder)
        codec.tokenizer.save_pretrained(folder)

    def copy_for_saving(self, codec: TextCodec) -> Callable[[Path], None]:
        """Copies the weights now; the result writes what `save` would have, later."""
        write_model = copy_for_saving(self.model)

        def write(folder: Path) -> None:
            write_model(folder)
            codec.tokenizer.save_pretrained(folder)

        return write

    def load_weights(self, folder: Path) -> None:
        """Takes over the weights of a folder that was saved, bit for bit."""
        load_weights(self.model, folder)

    def frozen_copy(self) -> Student:
        """The student as it is, for the KL reference."""
        frozen = copy.deepcopy(self)
        return frozen.requires_grad_(False)
