"""Which token is the last of each sequence: by a length, a mask, or the offsets of a packed line.

Shapes: B sequences, L columns or T packed tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.arguments import can_look_at, check_device, check_shape
from gad_fast.kernels.optional_triton import tl, triton


class Ends(NamedTuple):
    """What tells the last token of each sequence: at most one of the three is there.

    Without one each sequence is a single token, its last.
    """

    lengths: Tensor | None
    """int [B]."""
    attention_mask: Tensor | None
    """int or bool [B, L], not 0 at tokens."""
    cu_seqlens: Tensor | None
    """int [B + 1], where each packed sequence starts, and T."""

    def count(self, hidden: Tensor) -> int:
        """B."""
        return hidden.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def rows(self, hidden: Tensor) -> Tensor:
        """Row of each last token among all tokens laid end to end, int64 [B]; -1 without one.

        Args:
            hidden: `[B, L, D]`, or `[1, T, D]` packed.
        """
        B, L, _ = hidden.shape
        if self.cu_seqlens is not None:
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
            return torch.where((starts >= 0) & (starts < ends) & (ends <= L), ends - 1, -1)
        first_rows = L * torch.arange(B, device=hidden.device)
        if self.lengths is not None:
            last = self.lengths.long() - 1
        elif self.attention_mask is not None:
            columns = torch.arange(L, device=hidden.device)
            last = torch.where(self.attention_mask != 0, columns, -1).amax(1)
        else:
            return first_rows
        return torch.where((last >= 0) & (last < L), first_rows + last, -1)


@triton.jit
def last_row(lengths, attention_mask, cu_seqlens, i_b, L, BLOCK_L: tl.constexpr):
    """`Ends.rows` of one sequence."""
    start = i_b * L
    low, high = start, start + L
    last = start
    if cu_seqlens is not None:
        low, high = tl.load(cu_seqlens + i_b).to(tl.int64), i_b * 0 + L
        last = tl.load(cu_seqlens + i_b + 1).to(tl.int64) - 1
    if lengths is not None:
        last = start + tl.load(lengths + i_b).to(tl.int64) - 1
    if attention_mask is not None:
        last_column = i_b * 0 - 1
        for first_column in range(0, L, BLOCK_L):
            o_l = first_column + tl.arange(0, BLOCK_L)
            b_mask = tl.load(attention_mask + start + o_l, mask=o_l < L, other=0)
            b_column = tl.where(b_mask != 0, o_l, -1)
            last_column = tl.maximum(last_column, tl.max(b_column, 0).to(tl.int64))
        last = start + last_column
    return tl.where((last >= low) & (last < high) & (low >= 0), last, -1)


def checked_sequences(hidden: Tensor, ends: Ends) -> Tensor:
    """Hidden as [B, L, D], or packed as [1, T, D]; raises ValueError where the ends do not fit it.

    Args:
        hidden: `[B, L, D]`, packed `[T, D]`, or `[B, D]` of the last tokens alone.
        ends: of what came.
    """
    given = [name for name, tensor in zip(ends._fields, ends, strict=True) if tensor is not None]
    allowed = {2: ([], ["cu_seqlens"]), 3: (["lengths"], ["attention_mask"])}
    if given not in allowed.get(hidden.dim(), ()):
        msg = (
            "hidden must be [B, L, D] with lengths or attention_mask, [T, D] with cu_seqlens, or "
            f"[B, D] with none, got {tuple(hidden.shape)} with {', '.join(given) or 'none'}"
        )
        raise ValueError(msg)
    if hidden.dim() == 2:
        hidden = hidden[:, None] if ends.cu_seqlens is None else hidden[None]
    if hidden.shape[1] == 0:
        msg = f"hidden must hold at least one token, got {tuple(hidden.shape)}"
        raise ValueError(msg)
    if given:
        _check_ends(given[0], ends, hidden)
    return hidden


def _check_ends(name: str, ends: Ends, hidden: Tensor) -> None:
    B, L, _ = hidden.shape
    tensor = getattr(ends, name)
    check_device(name, tensor, hidden.device)
    if tensor.is_floating_point() or tensor.is_complex():
        msg = f"{name} must be integers, got {tensor.dtype}"
        raise ValueError(msg)
    if name != "cu_seqlens":
        shape = torch.Size((B,) if name == "lengths" else (B, L))
        check_shape(name, tensor, shape, of="the sequences")
    elif tensor.dim() != 1 or tensor.numel() == 0:
        msg = f"cu_seqlens must be [B + 1], got {tuple(tensor.shape)}"
        raise ValueError(msg)
    if can_look_at(tensor):
        is_missing = ends.rows(hidden) < 0
        if is_missing.any():
            index = is_missing.nonzero()[0].item()
            msg = f"{name} must end each sequence within its {L} tokens, sequence {index} does not"
            raise ValueError(msg)
