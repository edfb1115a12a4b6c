"""The one door from text to token ids and back, and from chats to prompts.

Templates are rendered by transformers' own jinja, so that they match the model's to the byte; all
tokenizing happens in the Rust core, in one call for many texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow
from numpy.typing import NDArray
from transformers import AutoTokenizer

from gad_fast import _core
from gad_fast.errors import DataError, ModelError
from gad_fast.records import Ids, Message, Response, TokenBatch

_MARKER = "GAD-FAST-ANSWER"


@runtime_checkable
class ArrowArray(Protocol):
    """One array of Arrow, of whatever library."""

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        """The array in the C data interface."""
        ...


@runtime_checkable
class ArrowStream(Protocol):
    """A column of Arrow in chunks, of whatever library."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """The chunks in the C data interface."""
        ...


ArrowStrings: TypeAlias = ArrowArray | ArrowStream


class TextCodec:
    """A model's tokenizer and chat template.

    Attributes:
        end_id: the token with which the chat template closes an answer; every finished response,
            the teacher's and the student's, ends with it.
        pad_id: a special token other than `end_id`, or None if the tokenizer has no other.
    """

    end_id: int
    pad_id: int | None

    def __init__(self, tokenizer: Any, *, source: str) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {source} has no chat template, which prompts need "
                f"(use an instruct model, or add chat_template to its tokenizer_config.json)"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {source} has no EOS token, so a response could never end "
                f"(set eos_token in its tokenizer_config.json)"
            )
        self.tokenizer = tokenizer
        self._core = _core_tokenizer(tokenizer, source)
        self.end_id = _end_id(tokenizer)
        self.pad_id = _pad_id(tokenizer, self.end_id)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TextCodec:
        """Loads the tokenizer of a model folder or Hub id; never runs code that comes with it.

        Raises:
            ModelError: no tokenizer is there, or it lacks a chat template or an EOS token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot load a tokenizer from {path}: {_first_line(error)}"
            ) from error
        return cls(tokenizer, source=str(path))

    @property
    def num_tokens(self) -> int:
        """Number of different tokens, special ones included."""
        return len(self.tokenizer)

    def encode_batch(self, texts: Sequence[str] | ArrowStrings) -> TokenBatch:
        """Token ids of texts; special tokens in a text are recognised, none are added.

        Args:
            texts: strings, or a column of them in Arrow's form, from pyarrow, polars or any other
                library with its PyCapsule interface; a column makes no Python strings.

        Raises:
            DataError: a text has a word without a token, is no valid Unicode, or is null in its
                column.
        """
        try:
            if isinstance(texts, ArrowArray | ArrowStream):
                return TokenBatch(*self._core.encode_utf8(*_utf8_of(texts)))
            return TokenBatch(*self._core.encode_batch(texts))
        except _core.TokenizerError as error:
            raise DataError(f"cannot tokenize: {error}") from error

    def encode_chats(
        self, chats: Sequence[Sequence[Message]], *, add_generation_prompt: bool
    ) -> TokenBatch:
        """Token ids of chats in the model's template.

        Raises:
            DataError: the template refuses a chat, a role that it does not know for instance.
        """
        return self.encode_batch(
            [self._render(chat, add_generation_prompt=add_generation_prompt) for chat in chats]
        )

    def encode_responses(self, texts: Sequence[str], *, max_tokens: int) -> list[Response]:
        """Responses as a student that wrote the same texts would have left them.

        They are parts of one array: each keeps all of it in memory.

        Raises:
            DataError: as `encode_batch`.
        """
        try:
            ids, offsets, is_finished = self._core.encode_responses(
                texts, end_id=self.end_id, max_tokens=max_tokens
            )
        except _core.TokenizerError as error:
            raise DataError(f"cannot tokenize: {error}") from error
        batch = TokenBatch(ids, offsets)
        return [Response(*row) for row in zip(batch, is_finished.tolist(), strict=True)]

    def decode_batch(self, batch: TokenBatch | Sequence[Ids]) -> list[str]:
        """Texts of token ids, without special tokens."""
        batch = batch if isinstance(batch, TokenBatch) else TokenBatch.of(list(batch))
        return self._core.decode_batch(batch.ids, batch.offsets, skip_special_tokens=True)

    def decode_stream(self, stop: Sequence[str] = ()) -> _core.DecodeStream:
        """Decodes one response while it is sampled, without special tokens.

        Args:
            stop: strings that end the text; none may be empty.
        """
        return self._core.decode_stream(stop, skip_special_tokens=True)

    def decode_responses(self, responses: Sequence[Response]) -> list[str]:
        """Texts of responses, without special tokens."""
        return self.decode_batch([response.ids for response in responses])

    def has_same_tokens(self, other: TextCodec) -> bool:
        """Whether both give the same ids to every prompt and response."""
        return self.tokenizer.chat_template == other.tokenizer.chat_template and (
            self.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()
        )

    def _render(self, chat: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever jinja, or they themselves, choose
            raise DataError(
                f"the chat template refuses the messages {list(chat)!r:.200}: {_first_line(error)}"
            ) from error


def _utf8_of(texts: ArrowStrings) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of all texts of an Arrow column, and where each starts."""
    is_stream = isinstance(texts, ArrowStream)
    column: Any = pyarrow.chunked_array(texts) if is_stream else pyarrow.array(texts)
    if not _is_text(column.type):
        raise DataError(
            f"texts must be strings, got a column of type {column.type} (choose another column)"
        )
    if column.null_count:
        raise DataError(
            f"a null is no text, and the column has {column.null_count} in {len(column)} rows "
            f"(drop them, or fill them with empty strings)"
        )
    array = column.cast(pyarrow.large_string())
    array = array.combine_chunks() if is_stream else array
    _, offset_buffer, data_buffer = array.buffers()
    if len(array) == 0:
        return np.empty(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _is_text(type_: Any) -> bool:
    if pyarrow.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(type_) for check in checks)


def _core_tokenizer(tokenizer: Any, source: str) -> _core.Tokenizer:
    try:
        return _core.Tokenizer.from_json(tokenizer.backend_tokenizer.to_str())
    except _core.TokenizerError as error:
        raise ModelError(f"cannot use the tokenizer of {source}: {error}") from error


def _end_id(tokenizer: Any) -> int:
    """The special token that follows an answer in the template; EOS when there is none.

    A base model's EOS often differs from its turn end (`<|end_of_text|>` and `<|eot_id|>`); the
    student samples the turn end, so the teacher's text must be closed with that.
    """
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARKER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may refuse this chat; it then has no say in the matter
        return tokenizer.eos_token_id
    tail = tokenizer.encode(text.rpartition(_MARKER)[2], add_special_tokens=False)
    return tail[0] if tail and tail[0] in _special_ids(tokenizer) else tokenizer.eos_token_id


def _pad_id(tokenizer: Any, end_id: int) -> int | None:
    candidates = [tokenizer.pad_token_id, *sorted(_special_ids(tokenizer))]
    return next((id_ for id_ in candidates if id_ is not None and id_ != end_id), None)


def _special_ids(tokenizer: Any) -> set[int]:
    return {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
