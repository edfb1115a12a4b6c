"""The discriminator: one scalar for a response to a prompt, read at the response's last token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gad_fast import kernels
from gad_fast.config import Recipe
from gad_fast.errors import ConfigError, ModelError
from gad_fast.models.batch import Batch, Item
from gad_fast.models.learned import Learned
from gad_fast.models.loading import (
    Precision,
    load_config,
    load_scorer,
    require_context,
    scorer_on,
)
from gad_fast.models.lora import Adapter, AdapterSet
from gad_fast.models.micro_batches import lay_out, plan
from gad_fast.models.shared_prompts import can_share_prompts
from gad_fast.models.student import Student
from gad_fast.records import Group, Response
from gad_fast.text import TextCodec


def load_discriminator(
    recipe: Recipe, student: Student, student_codec: TextCodec, precision: Precision
) -> Discriminator:
    """The discriminator that a recipe names, with a tokenizer of its own if it has another one.

    With adapters, and the student's backbone, it reads through the student's own weights.

    Raises:
        ModelError: it cannot be loaded, or has no linear head of one output.
        ConfigError: it cannot read as many tokens as a sequence may have, or as many different.
    """
    settings = recipe.discriminator
    is_own = settings.model != "student"
    source = settings.model if is_own else recipe.student.model
    require_context(load_config(source), recipe.data, source)
    own_codec = TextCodec.from_pretrained(source) if is_own and _has_tokenizer(source) else None
    model, adapter = _scorer(recipe, student, precision)
    embeddings: Any = model.get_input_embeddings()
    num_readable = embeddings.weight.shape[0]
    if own_codec is None and num_readable < student_codec.num_tokens:
        raise ConfigError(
            f"discriminator.model {source} has no tokenizer and {num_readable} embeddings, but the "
            f"student has {student_codec.num_tokens} tokens (add the discriminator's tokenizer)"
        )
    reader = Reader(student_codec, own_codec)
    # Another tokenizer may need more tokens for the same text: then nothing is known of the most.
    max_tokens = recipe.data.max_tokens if reader.codec is student_codec else None
    return Discriminator(model, precision, reader, max_tokens=max_tokens, adapter=adapter)


class GroupScores(NamedTuple):
    """Scores of the groups of a micro-batch, float32 at least, attached to the graph."""

    teacher: Tensor
    """Float [B]."""
    student: Tensor
    """Float [B, G]."""


class Reader:
    """Gives the discriminator its tokens: the student's own, or its own tokenizer's.

    With a tokenizer of its own the discriminator reads the decoded texts, closed by its own end
    token where the response was finished; what was cut stays open.
    """

    def __init__(self, student_codec: TextCodec, own_codec: TextCodec | None) -> None:
        self._student_codec = student_codec
        is_same = own_codec is None or own_codec.has_same_tokens(student_codec)
        self._own_codec = None if is_same else own_codec
        self.codec = own_codec if own_codec is not None and not is_same else student_codec

    def read(self, group: Group) -> Item:
        """The prompt, and the rollouts followed by the teacher's response."""
        responses = [*group.rollouts, group.prompt.teacher]
        if self._own_codec is None:
            return Item(group.prompt.prompt_ids, responses)
        chats = [group.prompt.example.messages]
        prompt_ids = self._own_codec.encode_chats(chats, add_generation_prompt=True)[0]
        return Item(prompt_ids, self._transcribe(responses, self._own_codec))

    def _transcribe(self, responses: list[Response], codec: TextCodec) -> list[Response]:
        texts = codec.encode_batch(self._student_codec.decode_responses(responses))
        end = np.array([codec.end_id], dtype=np.int32)
        return [
            Response(np.append(ids, end) if response.is_finished else ids, response.is_finished)
            for response, ids in zip(responses, texts, strict=True)
        ]


class Discriminator(nn.Module):
    """A backbone with a scalar head.

    The head is applied here, in float32, at the last token only: bfloat16 scores tie within a
    group, and the pooling of transformers' classifiers goes by the pad token, which for many
    models is the end token itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        reader: Reader,
        *,
        max_tokens: int | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.shares_prompts = can_share_prompts(model, max_tokens=max_tokens)
        self.precision = precision
        self.reader = reader
        self.head = _head(model)
        if self.head.weight.dtype == torch.bfloat16:
            self.head.float()
        self.learned = Learned(model, adapter, self.head)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """What an update changes: all weights, or the adapter's and the head's."""
        return self.learned.parameters()

    def score(self, batch: Batch) -> Tensor:
        """Scores of N sequences at the last token of each response, Float [N]."""
        self.learned.activate()
        with self.precision.forward_pass(self.model):
            hidden: Tensor = self.model.base_model(
                **batch.model_inputs, use_cache=False
            ).last_hidden_state
        return kernels.last_token_score(batch.last_tokens(hidden), self.head.weight, self.head.bias)

    def score_groups(self, groups: Sequence[Group]) -> GroupScores:
        """Scores of whole groups of equal size in one pass; the teacher is read once a group."""
        return self._score_items([self.reader.read(group) for group in groups])

    def score_in_parts(
        self, groups: Sequence[Group], *, token_budget: int
    ) -> Iterator[tuple[list[int], GroupScores]]:
        """The same in micro-batches, each with the indices of its groups."""
        items = [self.reader.read(group) for group in groups]
        for indices in plan(items, token_budget=token_budget, is_shared=self.shares_prompts):
            yield indices, self._score_items([items[index] for index in indices])

    def _score_items(self, items: Sequence[Item]) -> GroupScores:
        batch = lay_out(
            items,
            is_shared=self.shares_prompts,
            pad_id=self.reader.codec.end_id,
            device=self.device,
        )
        scores = self.score(batch).unflatten(0, (len(items), -1))
        return GroupScores(teacher=scores[:, -1], student=scores[:, :-1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.precision.device

    def save(self, folder: Path) -> None:
        """Writes a folder that `AutoModelForSequenceClassification` loads, with its tokenizer.

        An adapter is merged into the weights, and stands beside them, with the head, in `adapter/`.
        """
        self._name_padding()
        self.learned.save(folder, self.reader.codec)

    def copy_for_saving(self) -> Callable[[Path], None]:
        """Copies what is learned now; the result writes it later: a whole model, or the adapter."""
        self._name_padding()
        return self.learned.copy_for_saving(self.reader.codec)

    def load_weights(self, folder: Path) -> None:
        """Takes over what a folder of `copy_for_saving` holds, head included, bit for bit."""
        self.learned.load(folder)

    def _name_padding(self) -> None:
        """Names the pad token by which transformers finds where a row ends: never the end token."""
        cast(Any, self.model.config).pad_token_id = self.reader.codec.pad_id


def _scorer(
    recipe: Recipe, student: Student, precision: Precision
) -> tuple[PreTrainedModel, Adapter | None]:
    """The model that scores, and its adapter if it has one."""
    settings = recipe.discriminator
    is_own = settings.model != "student"
    shared = student.learned.adapter
    if shared is not None and not is_own:
        model = scorer_on(student.model, recipe.student.model)
        return model, shared.adapters.add("discriminator")
    source = settings.model if is_own else recipe.student.model
    model = load_scorer(source, dtype=settings.dtype, device=precision.device)
    if recipe.lora.rank == 0:
        return model, None
    adapter = AdapterSet(model, recipe.lora, source).add("discriminator")
    _head(model).requires_grad_(True)
    return model, adapter


def _has_tokenizer(source: str) -> bool:
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def _head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"{type(model).__name__} has no linear head `score` with one output "
            f"(choose a decoder-only backbone for discriminator.model)"
        )
    return head
