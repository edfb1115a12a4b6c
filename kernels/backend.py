"""Which of an operation's two paths runs: its Triton kernels, or torch."""

from typing import Literal

import torch
from torch import Tensor

from gad_fast.kernels.optional_triton import HAS_TRITON, IS_INTERPRETED

Backend = Literal["auto", "triton", "torch"]


def resolve_backend(
    tensor: Tensor,
    backend: Backend,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Literal["triton", "torch"]:
    """Where "auto" leads: to "triton" for a CUDA tensor of one of the dtypes, else to "torch".

    Raises:
        ValueError: the backend does not exist, or Triton is asked for where it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        msg = f"backend must be one of auto, triton, torch, got {backend!r}"
        raise ValueError(msg)
    is_runnable = HAS_TRITON and tensor.dtype in dtypes
    if backend == "auto":
        return "triton" if is_runnable and tensor.is_cuda else "torch"
    if backend == "triton" and not (is_runnable and (tensor.is_cuda or IS_INTERPRETED)):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        msg = (
            f"backend 'triton' needs Triton and {names} on CUDA, "
            f"got {tensor.dtype} on {tensor.device} (use backend='torch')"
        )
        raise ValueError(msg)
    return backend
