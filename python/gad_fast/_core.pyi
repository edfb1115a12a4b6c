"""The Rust core of gad-fast.

It knows texts, ids and lengths; chat templates, tensors and weights live in Python.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FINISH_LENGTH",
    "FINISH_STOP",
    "Cache",
    "CacheCorruptError",
    "CacheError",
    "CacheLockedError",
    "DecodeStream",
    "Mailbox",
    "RolloutBatch",
    "RolloutBuffer",
    "Tokenizer",
    "TokenizerError",
    "balance",
    "cache_after_fork",
    "cache_before_fork",
    "cache_key",
    "group_layout",
    "pack_groups",
    "pack_sequences",
    "plan_micro_batches",
    "same_count",
]

FINISH_STOP: Final[int]
"""In a column of finish reasons: the student sampled its end token."""

FINISH_LENGTH: Final[int]
"""In a column of finish reasons: the rollout was cut at the token limit."""

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
            KeyboardInterrupt: ctrl-c during a long batch; the text at hand is finished first.
        """

    def encode_responses(
        self, texts: Sequence[str], *, end_id: int, max_tokens: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        """`encode_batch`, each text closed with the end token and cut as a student's rollout is.

        Args:
            texts: the responses.
            end_id: what closes them; a text that holds it is cut after the first.
            max_tokens: the limit, end token included.

        Returns:
            ids: shape [number of ids].
            offsets: shape [number of texts + 1], from 0 to the number of ids.
            is_finished: shape [number of texts]; false for those cut at the limit.

        Raises:
            TokenizerError: as `encode_batch`.
            OverflowError: `max_tokens` is negative.
            KeyboardInterrupt: ctrl-c during a long batch; the text at hand is finished first.
        """

    def encode_utf8(
        self, data: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """`encode_batch` of texts that lie end to end, as in a string array of Arrow.

        Args:
            data: the UTF-8 of all texts; copied as a whole, since another thread may write to it.
            offsets: text `i` is `data[offsets[i] : offsets[i + 1]]`.

        Raises:
            TokenizerError: a text is no UTF-8, or holds a word that the tokenizer has no token for.
            ValueError: the offsets do not cut the data.
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

    def decode_stream(self, stop: Sequence[str] = (), *, skip_special_tokens: bool) -> DecodeStream:
        """A stream that decodes one sequence while it is being sampled.

        Args:
            stop: strings that end the text, wherever tokens cut them. The first is the one that
                ends first.
            skip_special_tokens: whether special tokens are no part of the text.

        Raises:
            ValueError: a stop string is empty.
        """

@final
class DecodeStream:
    """The text of one sequence while it grows: made by `Tokenizer.decode_stream`.

    The pieces that it gives make up the text of `decode_batch`, cut before the first stop string.
    """

    def push(self, id: int) -> str:
        """The text that is final with this id: "" within a character, or in what may be a stop.

        An id that stands for no token is passed over, and so is one after the end.

        Raises:
            TokenizerError: the decoder refuses the sequence.
            ValueError: the id is negative.
            OverflowError: the id does not fit 32 bits.
        """

    def finish(self) -> str:
        """The rest of the text, of a sequence that ends here."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came; it is no part of the text, nor is what follows it."""

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

_CacheRequest = tuple[str, object, object, int]
"""Teacher, messages, sampling, sample index."""

_CachedRequest = tuple[str, str, str, int]
"""Teacher, messages as JSON, sampling as JSON, sample index."""

_CacheResponse = tuple[str, str | None, int | None, int | None, float | None, float, Sequence[str]]
"""Text, finish reason, prompt tokens, response tokens, cost, created, flags."""

class CacheError(Exception):
    """A teacher cache cannot be opened, read or written."""

class CacheCorruptError(CacheError):
    """A teacher cache does not hold what was stored in it."""

class CacheLockedError(CacheError):
    """Another process writes to the teacher cache."""

@final
class Mailbox:
    """Where outcomes of `Cache.put_soon` come in, for one event loop.

    The thread that writes leaves them here without waiting for the interpreter.
    """

    def __new__(cls) -> Mailbox:
        """An empty one.

        Raises:
            OSError: the process has no file descriptor left.
        """

    def fileno(self) -> int:
        """The descriptor that becomes readable when an outcome comes."""

@final
class Cache:
    """Responses of teachers, in one SQLite file.

    It may be shared between threads; a forked process can read. Every method releases the
    interpreter, and those that wait for the disk look for Ctrl-C meanwhile.
    """

    @staticmethod
    def open(path: str | PathLike[str], *, compression: str) -> Cache:
        """Opens a cache to read and write, and makes it if it is not there.

        Args:
            path: the file, on a local disk.
            compression: "zstd" or "none", for texts stored from now on.

        Raises:
            CacheLockedError: another process writes to it.
            CacheError: it is no cache, or cannot be opened.
            ValueError: there is no such compression.
        """

    @staticmethod
    def open_read_only(path: str | PathLike[str]) -> Cache:
        """Opens a cache that is there, whether or not another process writes to it.

        Raises:
            CacheError: it is no cache, or cannot be opened.
        """

    def put(self, request: _CacheRequest, response: _CacheResponse) -> bool:
        """Stores a response and returns after it is on disk: whether the request was new.

        Raises:
            CacheError: it is not on disk, or cannot be stored.
        """

    def put_many(self, rows: Sequence[tuple[_CacheRequest, _CacheResponse]]) -> list[bool]:
        """Stores responses and returns after all are on disk: which of the requests were new.

        Raises:
            CacheError: one of them is not on disk; those before it may be.
        """

    def put_soon(
        self, request: _CacheRequest, response: _CacheResponse, mailbox: Mailbox, token: int
    ) -> None:
        """Queues a response; the outcome comes to the mailbox under the token.

        It waits only while a thousand rows are queued already.

        Raises:
            CacheError: it cannot be stored. An outcome may come to the mailbox all the same.
        """

    def drain(self, mailbox: Mailbox) -> list[tuple[int, bool | CacheError]]:
        """Tokens and outcomes that came since the last call."""

    def get(self, request: _CacheRequest) -> _CacheResponse | None:
        """The response to a request, checked against its hash.

        Raises:
            CacheCorruptError: it is not what was stored.
            CacheError: it cannot be read.
        """

    def contains(self, request: _CacheRequest) -> bool:
        """Whether a response to a request was stored.

        Raises:
            CacheError: it cannot be read.
        """

    def rows_after(self, id: int, limit: int) -> list[tuple[int, _CachedRequest, _CacheResponse]]:
        """At most `limit` rows after the one with `id`, in the order in which they were stored.

        Raises:
            CacheCorruptError: a row is not what was stored.
            CacheError: it cannot be read.
        """

    def __len__(self) -> int:
        """Number of responses."""

    def info(self) -> tuple[int, int, int, list[str], bool, int]:
        """Format version, responses, prompts, teachers, whether it has a dictionary, bytes."""

    def verify(self) -> tuple[int, list[str]]:
        """Number of rows checked, and what is wrong.

        Raises:
            CacheError: it cannot be read at all.
        """

    def close(self) -> None:
        """Returns after everything queued is on disk; later puts are refused, reading goes on."""

def cache_key(request: _CacheRequest) -> str:
    """The key of a request, in hexadecimal.

    Raises:
        CacheError: the messages or the sampling parameters are malformed.
    """

def cache_before_fork() -> None:
    """Waits until no thread is inside a cache, and keeps all out until `cache_after_fork`."""

def cache_after_fork() -> None:
    """Lets threads into caches again; to be called in the parent and in the child."""

@final
class RolloutBuffer:
    """Collects rollouts from many threads, and gives them out in whole groups.

    A group is ready when its last rollout is in, and ready groups leave in that order. Its number
    is free again once the group has left. `len` is the number of rollouts in the buffer, those of
    incomplete groups included. May be shared between threads.

    Args:
        group_size: rollouts a group, at least 1.
        streams: names of what each rollout carries beside its ids, one number a response token.
        max_staleness: student updates that a rollout may be behind when its group is taken, at
            least 0. A group with an older rollout is dropped and counted; None takes any.
    """

    def __new__(
        cls,
        group_size: int,
        *,
        streams: Sequence[str] = ...,
        max_staleness: int | None = None,
    ) -> RolloutBuffer:
        """An empty buffer; its only stream is "logprobs" unless others are named.

        Raises:
            ValueError: `group_size` or `max_staleness` is too small, or a stream is named twice.
        """

    def push(
        self,
        group_id: int,
        prompt_ids: NDArray[np.int32],
        response_ids: NDArray[np.int32],
        *,
        finish_reason: int,
        weight_version: int,
        **streams: NDArray[np.float32],
    ) -> None:
        """Adds a rollout to its group; what is refused changes nothing.

        Args:
            group_id: the caller's number for the prompt.
            prompt_ids: shape [P], P >= 1, the same in the whole group.
            response_ids: shape [R], R >= 1.
            finish_reason: `FINISH_STOP` or `FINISH_LENGTH`.
            weight_version: number of student updates behind the weights that sampled it.
            streams: by name every stream of the buffer, `logprobs` for instance, shape [R].

        Raises:
            ValueError: an id is negative, a length does not fit, a stream is unknown or missing,
                the group already has its rollouts or another prompt, or the buffer is closed.
        """

    def push_teacher(
        self, group_id: int, tokenizer: Tokenizer, text: str, *, end_id: int, max_tokens: int
    ) -> None:
        """Encodes the teacher's response to a group's prompt and keeps it with the group.

        It is cut as a rollout is: after the first end token, one being appended, and at
        `max_tokens`. Push it before the group's last rollout: a group that is ready may be taken
        without it, and then this starts a new group.

        Raises:
            TokenizerError: the text cannot be encoded.
            ValueError: `end_id` or `max_tokens` is too small, the group already has its teacher
                response, or the buffer is closed.
        """

    def take(
        self, num_groups: int, *, current_version: int, timeout: float | None = None
    ) -> RolloutBatch | None:
        """Waits for so many ready groups and takes them out of the buffer.

        Other threads run meanwhile, and Ctrl-C ends the wait.

        Args:
            num_groups: at least 1.
            current_version: weight version that staleness is counted from. Stale groups are
                dropped here, and only here: an incomplete group stays until it is complete.
            timeout: seconds, at least 0; None waits until `close`.

        Returns:
            None if too few groups are ready when the time is over or the buffer is closed; they
            stay in the buffer.

        Raises:
            ValueError: `num_groups` or `timeout` is too small.
        """

    def close(self) -> None:
        """Refuses rollouts from now on and ends every wait; ready groups can still be taken."""

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""

    @property
    def ready_groups(self) -> int:
        """Number of groups that are complete and not taken, stale ones included."""

    @property
    def num_dropped(self) -> int:
        """Number of groups dropped so far because they were stale."""

    def __len__(self) -> int:
        """Number of rollouts in the buffer."""

@final
class RolloutBatch:
    """The rollouts of whole groups as a struct of arrays, immutable.

    A row is one rollout, and the rows of a group follow each other in the order in which they
    came. The columns are read-only views of the batch's memory, which lives as long as any of
    them. `torch.from_dlpack(column)` shares it without a warning (numpy 2.1 or newer);
    `torch.asarray(column, copy=False)` and `torch.from_numpy(column)` share it too, and warn once
    that torch has no read-only tensors. Writing to such a tensor would change the batch: clone it
    first.
    """

    def __len__(self) -> int:
        """Number of rollouts, k."""

    @property
    def num_groups(self) -> int:
        """Number of groups, k / `group_size`."""

    @property
    def group_size(self) -> int:
        """Rollouts a group."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and response of every row, shape [n]."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each row starts in `tokens`, and the end of the last, shape [k + 1]."""

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's prompt, shape [k]."""

    @property
    def response_offsets(self) -> NDArray[np.int64]:
        """Where each row starts in a stream, and the end of the last, shape [k + 1]."""

    @property
    def group_ids(self) -> NDArray[np.int64]:
        """Number of each row's group, as it was pushed, shape [k]."""

    @property
    def finish_reasons(self) -> NDArray[np.uint8]:
        """`FINISH_STOP` or `FINISH_LENGTH` of each row, shape [k]."""

    @property
    def weight_versions(self) -> NDArray[np.int64]:
        """Version of the weights that sampled each row, shape [k]."""

    @property
    def teacher_tokens(self) -> NDArray[np.int32]:
        """The teacher's response of each group; no tokens where none was pushed."""

    @property
    def teacher_offsets(self) -> NDArray[np.int64]:
        """Where each group starts in `teacher_tokens`, and the end, shape [num_groups + 1]."""

    def stream(self, name: str) -> NDArray[np.float32]:
        """One number a response token, shape [response_offsets[-1]].

        Raises:
            ValueError: there is no such stream.
        """

    @property
    def scores(self) -> NDArray[np.float32] | None:
        """The discriminator's raw scalar of each row, shape [k]; None before `with_scores`."""

    @property
    def rewards(self) -> NDArray[np.float32] | None:
        """The score of each row as the student's loss sees it; None before `with_scores`."""

    def with_scores(
        self, scores: NDArray[np.float32], rewards: NDArray[np.float32] | None = None
    ) -> RolloutBatch:
        """A batch of the same rows, which it shares, with scores and rewards.

        Args:
            scores: shape [k].
            rewards: shape [k]; the scores where it is None.

        Raises:
            ValueError: a length does not fit, or a number is not finite.
        """

    def advantages(
        self,
        scale: Literal["std", "none"] = "std",
        std_floor: float = 0.0,
        leave_one_out: bool = False,
        eps: float = 1e-6,
    ) -> NDArray[np.float32]:
        """Each reward against those of its group, shape [k]; the caller's own array.

        `(r - mean) / (max(std, std_floor) + eps)` with the sample standard deviation, in 64 bits;
        exactly 0 in a group whose rewards are all equal, and in a group of one.

        Args:
            scale: "none" leaves the division out (Dr. GRPO, arXiv 2503.20783).
            std_floor: least standard deviation to divide by, in units of the reward.
            leave_one_out: subtracts the mean of the others instead (RLOO, arXiv 2402.14740).
            eps: added to the standard deviation, in units of the reward.

        Raises:
            ValueError: there are no rewards yet, `scale` is neither, or a number is negative.
        """

    def gather(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_], NDArray[np.int32]]:
        """Rows laid end to end for one forward pass, in the order of `indices`.

        Returns:
            tokens: prompt and response of each row, shape [T]; the caller's own array, as all here.
            position_ids: position of each token in its row, shape [T].
            response_mask: whether a token belongs to a response, shape [T].
            cu_seqlens: where each row starts, and the end of the last, shape [rows + 1].

        Raises:
            ValueError: there is no row of some index, or T does not fit 32 bits.
        """

    def gather_stream(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """A stream beside the tokens of `gather`, shape [T]: 0 over prompts."""

    def gather_groups(self, group_indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """Tokens of whole groups, each as `[prompt][rollouts ...][teacher]`, in this order.

        What `group_layout` describes, given `prompt_lengths[::group_size]`,
        `np.diff(response_offsets)`, `np.arange(0, k + 1, group_size)` and
        `np.diff(teacher_offsets)`.

        Raises:
            ValueError: there is no group of some index, or the tokens do not fit 32 bits.
        """

    def spread(
        self, values: NDArray[np.float32], indices: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """A number of each row, its advantage for instance, beside the tokens of `gather`.

        Args:
            values: shape [k], for all rows of the batch.
            indices: rows that are gathered.

        Returns:
            Shape [T]: 0 over prompts, the number of the row over its response.
        """

def pack_sequences(
    lengths: NDArray[np.int64],
    *,
    token_budget: int,
    max_sequences: int | None = None,
    pad_to_multiple: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs sequences into bins by best-fit decreasing; deterministic, every index comes once.

    Args:
        lengths: tokens of each sequence, at least 0.
        token_budget: most tokens of a bin, at least 1. A sequence over it has a bin for itself.
        max_sequences: most sequences of a bin, at least 1.
        pad_to_multiple: each sequence takes up its length rounded up to a multiple of this.

    Returns:
        indices: the sequences of all bins, longest first in each.
        offsets: bin `b` is `indices[offsets[b] : offsets[b + 1]]`.

    Raises:
        ValueError: a number is too small.
    """

def pack_groups(
    prompt_lengths: NDArray[np.int64],
    response_lengths: NDArray[np.int64],
    group_offsets: NDArray[np.int64],
    teacher_lengths: NDArray[np.int64],
    *,
    token_budget: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs whole groups, each as `[prompt][rollouts ...][teacher]`, as `pack_sequences` does.

    Args:
        prompt_lengths: tokens of each group's prompt, shape [B].
        response_lengths: tokens of each rollout, shape [N].
        group_offsets: where each group starts in the rollouts, and the end, shape [B + 1].
        teacher_lengths: tokens of each group's teacher response, 0 for none, shape [B].
        token_budget: most tokens of a bin, at least 1. A group over it has a bin for itself.

    Returns:
        indices: the groups of all bins.
        offsets: bin `b` is `indices[offsets[b] : offsets[b + 1]]`.

    Raises:
        ValueError: the columns do not fit each other, or a number is too small.
    """

def group_layout(
    prompt_lengths: NDArray[np.int64],
    response_lengths: NDArray[np.int64],
    group_offsets: NDArray[np.int64],
    teacher_lengths: NDArray[np.int64],
    group_indices: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """What attention has to know of groups laid out as `[prompt][rollouts ...][teacher]`.

    A token sees those before it of its own segment, and the prompt of its group.

    Args:
        prompt_lengths: as in `pack_groups`, and so the next three.
        response_lengths: shape [N].
        group_offsets: shape [B + 1].
        teacher_lengths: shape [B].
        group_indices: the groups of one bin, in the order in which they lie there.

    Returns:
        position_ids: position of each token in its sequence, shape [T]; every response goes on
            where the prompt ended.
        segment_ids: 0 for the prompt, 1 ... for the rollouts, then the teacher, shape [T].
        cu_seqlens: where each group starts, and the end of the last.

    Raises:
        ValueError: the columns do not fit each other, there is no group of some index, or T does
            not fit 32 bits.
    """

def balance(
    costs_or_lengths: NDArray[np.int64] | NDArray[np.float64],
    num_ranks: int,
    *,
    linear: float = 1.0,
    quadratic: float = 0.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distributes work over ranks so that all are done at about the same time.

    An item of size n costs `linear * n + quadratic * n^2`. Karmarkar-Karp while items times ranks
    are at most a million, else the least loaded rank takes the costliest item, and exchanges even
    out the rest. Deterministic; ranks get as many items as it takes, possibly none.

    Args:
        costs_or_lengths: sizes of the items, at least 0.
        num_ranks: from 1 to 2^20.
        linear: at least 0.
        quadratic: at least 0.

    Returns:
        indices: the items of all ranks, costliest first in each; the first rank has most to do.
        offsets: rank `r` does `indices[offsets[r] : offsets[r + 1]]`.

    Raises:
        ValueError: a number is out of its bounds, or a cost is not finite.
    """

def same_count(indices: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """A schedule in which all ranks do the same number of micro-batches.

    A rank that did fewer would leave the others waiting in a collective operation.

    Args:
        indices: the micro-batches of all ranks, as `balance` gives them.
        offsets: where each rank starts, and the end of the last.

    Returns:
        Shape [ranks, most micro-batches of a rank]: the micro-batches of each rank, and -1 for each
        empty one that is appended.

    Raises:
        ValueError: the offsets do not cut the indices, or the schedule would be too large.
    """
