"""The head that turns hidden states into logits, and what the linear operations ask of it."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gad_fast.kernels.arguments import check_choice, check_device, check_float, check_range
from gad_fast.kernels.backend import Backend
from gad_fast.kernels.chunked_torch import Scaling

LogitsDtype = Literal["float32", "bfloat16"]


class LinearHead(NamedTuple):
    """logits = cap(logit_scale * (X W^T + b)), with cap(u) = softcap tanh(u / softcap)."""

    weight: Tensor
    """[V, D], in the dtype of the hidden states."""
    bias: Tensor | None
    """[V]."""
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, logits_dtype: str) -> Tensor:
        """X W^T + b, [C, V], the caller's own: float32 or wider where the device has that product.

        A CPU has none for bfloat16 operands, and gives its rounded result as it is.
        """
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            logits = hidden @ self.weight.t()
        if self.bias is not None:
            logits += self.bias
        return logits.bfloat16().to(hidden.dtype) if logits_dtype == "bfloat16" else logits

    def scaling(self, inverse_temperature: Tensor) -> Scaling:
        """What makes z of its logits."""
        return Scaling(inverse_temperature, self.logit_scale, self.softcap)


class HeadCall(NamedTuple):
    """How a head is to be applied."""

    temperature: float | Tensor
    logits_dtype: LogitsDtype
    max_workspace_mb: float | None
    backend: Backend


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logits_dtype: str,
) -> LinearHead:
    """The head; raises ValueError, naming the argument, unless it fits the hidden states."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(name, tensor)
            check_device(name, tensor, hidden.device)
            _refuse_float16(name, tensor)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        msg = (
            f"weight must be [V, D] with the D of hidden, {hidden.shape[-1]}, "
            f"got {tuple(weight.shape)}"
        )
        if weight.numel() == 0:
            msg += " (a sharded weight is empty outside its module: use FusedLMHead)"
        raise ValueError(msg)
    if bias is not None and bias.shape != weight.shape[:1]:
        msg = f"bias must be [V] with the V of weight, {weight.shape[0]}, got {tuple(bias.shape)}"
        raise ValueError(msg)
    check_range("logit_scale", logit_scale, 0.0, is_open=True)
    if softcap is not None:
        check_range("softcap", softcap, 0.0, is_open=True)
    check_choice("logits_dtype", logits_dtype, get_args(LogitsDtype))
    return LinearHead(weight, bias, logit_scale, softcap)


def autocast_hidden(hidden: Tensor) -> Tensor:
    """The hidden states in the dtype in which a linear layer would now compute."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


def logits_bytes(weight: Tensor, backend: str) -> int:
    """What the logits of one token and their gradient take where neither is ever in tiles."""
    # In torch on a GPU the logits of bfloat16 operands are wide, and their gradient is beside them.
    is_apart = backend == "torch" and weight.is_cuda and weight.dtype == torch.bfloat16
    return weight.shape[0] * (6 if is_apart else weight.itemsize)


def workspace_bytes(megabytes: float | None, device: torch.device) -> int:
    """What a part of the logits may take; raises ValueError unless it is above 0."""
    if megabytes is None:
        megabytes = 64 if device.type == "cpu" else 1024
    check_range("max_workspace_mb", megabytes, 0, is_open=True)
    return int(megabytes * 2**20)


def _refuse_float16(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float16:
        msg = (
            f"{name} must be bfloat16, float32 or float64, got float16 (gradients near one over "
            f"the number of tokens underflow in it)"
        )
        raise ValueError(msg)
