"""What a player learns: all weights of its model, or an adapter of it, with a head perhaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from gad_fast.models.lora import Adapter
from gad_fast.models.saving import copy_for_saving, load_weights
from gad_fast.text import TextCodec


@dataclass(frozen=True, slots=True)
class Learned:
    """The weights that updates change, out of a model and back into it."""

    model: PreTrainedModel
    adapter: Adapter | None
    """None where all weights are learned."""
    head: nn.Linear | None = None
    """What is trained, and saved, with the adapter."""

    def activate(self) -> None:
        """Lets the adapter, if there is one, take part in what the model reads from now on."""
        if self.adapter is not None:
            self.adapter.activate()

    def parameters(self) -> Iterable[nn.Parameter]:
        """All weights, or those of the adapter and the head."""
        if self.adapter is None:
            return self.model.parameters()
        head = [] if self.head is None else self.head.parameters()
        return [*self.adapter.parameters(), *head]

    def save(self, folder: Path, codec: TextCodec) -> None:
        """Writes a folder that transformers loads, with its tokenizer.

        An adapter is merged into the weights, and stands beside them in `adapter/`.
        """
        if self.adapter is None:
            self.model.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, state_dict=self.adapter.merged_state(self.model))
            self.adapter.copy_for_saving(self.model, self.head)(folder / "adapter")
        codec.tokenizer.save_pretrained(folder)

    def copy_for_saving(self, codec: TextCodec) -> Callable[[Path], None]:
        """Copies what is learned now; the result writes it later: a whole model, or the adapter."""
        write_weights = (
            copy_for_saving(self.model)
            if self.adapter is None
            else self.adapter.copy_for_saving(self.model, self.head)
        )

        def write(folder: Path) -> None:
            write_weights(folder)
            codec.tokenizer.save_pretrained(folder)

        return write

    def load(self, folder: Path) -> None:
        """Takes over what a folder of `copy_for_saving` holds, bit for bit."""
        if self.adapter is None:
            load_weights(self.model, folder)
        else:
            self.adapter.load(folder, self.model, self.head)
