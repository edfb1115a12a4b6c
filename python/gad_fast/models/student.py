"""The student: the language model that is being distilled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gad_fast import kernels
from gad_fast.config import Recipe
from gad_fast.models.batch import Batch, Item
from gad_fast.models.language_head import fuse_head
from gad_fast.models.learned import Learned
from gad_fast.models.loading import Precision, load_causal_lm
from gad_fast.models.lora import Adapter, AdapterSet
from gad_fast.models.micro_batches import micro_batches
from gad_fast.models.shared_prompts import can_share_prompts
from gad_fast.text import TextCodec


def load_student(recipe: Recipe, precision: Precision) -> Student:
    """The student that a recipe names, with an adapter if it is to learn one.

    Raises:
        ModelError: it cannot be loaded, or the adapter to start from is another model's.
        ConfigError: it has none of the layers that an adapter is asked for.
    """
    settings, max_tokens = recipe.student, recipe.data.max_tokens
    model = load_causal_lm(settings.model, dtype=settings.dtype, device=precision.device)
    if recipe.lora.rank == 0:
        return Student(model, precision, max_tokens=max_tokens)
    adapter = AdapterSet(model, recipe.lora, settings.model).add("student")
    if recipe.lora.start_from is not None:
        adapter.load(Path(recipe.lora.start_from), model)
    return Student(model, precision, max_tokens=max_tokens, adapter=adapter)


class Student(nn.Module):
    """A causal language model that gives the log-probabilities of responses and losses on them.

    Its head is replaced by one that never makes whole logits, wherever that gives the same ones;
    otherwise the model's own logits of the response tokens are taken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        *,
        max_tokens: int | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.learned = Learned(model, adapter)
        self.head_options = fuse_head(model)
        self.shares_prompts = can_share_prompts(model, max_tokens=max_tokens)

    def activate(self) -> None:
        """Lets its adapter, if it has one, take part in what the model reads from now on."""
        self.learned.activate()

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What an update changes: all weights, or the adapter's."""
        return self.learned.parameters()

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
        with self.precision.forward_pass(self.model):
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
        with self.precision.forward_pass(self.model):
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
        self.activate()
        output: Any = self.model.base_model(**batch.model_inputs, use_cache=False)
        head: Any = self.model.get_output_embeddings()
        return head(
            batch.predictors(output.last_hidden_state),
            batch.labels,
            **self.head_options.as_keywords(),
            **options,
        )

    def _logits(self, batch: Batch) -> Tensor:
        self.activate()
        output: Any = self.model(**batch.model_inputs, use_cache=False)
        return batch.predictors(output.logits)  # [T, V]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.precision.device

    def save(self, folder: Path, codec: TextCodec) -> None:
        """Writes a folder that `AutoModelForCausalLM` loads, with its tokenizer.

        An adapter is merged into the weights, and stands beside them in `adapter/`.
        """
        self.learned.save(folder, codec)

    def copy_for_saving(self, codec: TextCodec) -> Callable[[Path], None]:
        """Copies what is learned now; the result writes it later: a whole model, or the adapter."""
        return self.learned.copy_for_saving(codec)

    def load_weights(self, folder: Path) -> None:
        """Takes over what a folder of `copy_for_saving` holds, bit for bit."""
        self.learned.load(folder)

    def frozen_copy(self) -> Student:
        """The student as it is, for the KL reference: a copy of what it learns, and no more."""
        adapter = self.learned.adapter
        if adapter is None:
            return copy.deepcopy(self).requires_grad_(False)
        frozen = copy.copy(self)
        frozen.learned = Learned(self.model, adapter.frozen_copy("reference"))
        return frozen
