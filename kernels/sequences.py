"""Which tokens make up one sequence: the rows of a rectangle, or the segments of a packed line."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """S sequences over T tokens laid end to end."""

    shape: torch.Size
    """Of the labels: [T], or [S, L]."""
    cu_seqlens: Tensor | None
    """int [S + 1], where each sequence of a packed line starts, and T."""

    @property
    def are_known(self) -> bool:
        """Whether the tokens say where a sequence ends."""
        return self.cu_seqlens is not None or len(self.shape) == 2

    @property
    def count(self) -> int:
        """S."""
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def sums(self, values: Tensor) -> Tensor:
        """Sum of [T] over each sequence, [S]: without atomics, so the same in every run."""
        if self.cu_seqlens is None:
            return values.reshape(self.shape).sum(1)
        # `unsafe` leaves out a check of the offsets that would wait for the device.
        offsets = self.cu_seqlens.long()
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)

    def spread(self, values: Tensor) -> Tensor:
        """Gives each token the value of its sequence, [S] to [T]."""
        if self.cu_seqlens is None:
            return values[:, None].expand(self.shape).reshape(-1)
        tokens = torch.arange(self.shape.numel(), device=values.device)
        ids = torch.searchsorted(self.cu_seqlens.to(tokens.dtype), tokens, right=True) - 1
        return values[ids]
