"""The Rust core of gad-fast.

It knows texts, ids and lengths; chat templates, tensors and weights live in Python.
"""

from collections.abc import Sequence
from os import PathLike
from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tokenizer", "TokenizerError", "plan_micro_batches"]

class TokenizerError(ValueError):
    """A tokenizer file is not understood, or a text cannot be encoded or decoded with it."""

@final
class Tokenizer:
    """A tokenizer read from a Hugging Face `tokenizer.json`.

    It gives the ids that the `tokenizers` package gives, for whole batches, in packed arrays: `ids`
    holds all sequences end to end, and sequence `i` is `ids[offsets[i] : offsets[i + 1]]`. Padding
    and truncation that the file asks for are ignored. It may be shared between threads and used
    after a fork.
    """

    @staticmethod
    def from_file(path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`, of the current or an older format.

        `GAD_FAST_NUM_THREADS` bounds the threads that encode a batch; without it, every core is
        used.

        Raises:
            OSError: the file cannot be read.
            TokenizerError: the file describes no tokenizer that can be built.
            ValueError: `GAD_FAST_NUM_THREADS` is no whole number of at least 1.
        """

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """The tokenizer of the content of a `tokenizer.json`.

        Raises:
            TokenizerError: it describes no tokenizer that can be built.
            ValueError: `GAD_FAST_NUM_THREADS` is no whole number of at least 1.
        """

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the embedding table of a model may be larger."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the file spells it, or None if there is no such token."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The packed ids of the texts, and the offsets of each text in them.

        No special tokens are added around a text, but those which stand in it are recognised: a
        text from outside can forge a chat turn.

        Returns:
            ids: shape [number of ids].
            offsets: shape [number of texts + 1], from 0 to the number of ids.

        Raises:
            TokenizerError: a text holds a lone surrogate, or a word that the tokenizer has no token
                for.
        """

    def decode_batch(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        *,
        skip_special_tokens: bool,
    ) -> list[str]:
        """The text of each sequence; bytes that are no UTF-8 become U+FFFD.

        Ids that stand for no token are passed over, as a model's padded embeddings may yield them.

        Raises:
            ValueError: an id is negative, or the offsets do not cut the ids into consecutive
                sequences.
        """

def plan_micro_batches(
    rows: NDArray[np.int64],
    prompt_lengths: NDArray[np.int64],
    response_lengths: NDArray[np.int64],
    *,
    token_budget: int,
) -> list[NDArray[np.int64]]:
    """The indices of the items that share a forward pass, largest micro-batch first.

    An item is a number of rows that must stay together, for example a prompt's responses. A
    micro-batch is padded to a rectangle of `sum(rows) * (max(prompt_lengths) +
    max(response_lengths))` tokens. The plan is deterministic, and every index comes exactly once.

    Args:
        rows: sequences of each item, shape [number of items].
        prompt_lengths: tokens of the longest prompt of each item, same shape.
        response_lengths: tokens of the longest response of each item, same shape.
        token_budget: tokens a micro-batch may hold, padding included, at least 1. An item that is
            over it alone has a micro-batch for itself.

    Raises:
        ValueError: a number is negative, the shapes differ, or `token_budget` is less than 1.
    """
