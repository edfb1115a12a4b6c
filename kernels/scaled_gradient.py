"""A gradient that was made in the forward pass, times what the backward pass brings.

A product in torch would round the factor to the dtype of the gradient.
"""

import torch
from torch import Tensor

from gad_fast.kernels.logprob_kernels import scale_gradient


def scaled_gradient(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """Gradient [R, C] times factor []; the gradient itself where the factor is seen to be 1.

    It is seen on a CPU only, where a look is free, and of a plain tensor only: one that is traced
    has no value. That spares the copy in the usual case, a loss that nothing scales.
    """
    is_plain = type(factor) is Tensor and factor.device.type == "cpu"
    if is_plain and not torch.compiler.is_compiling() and factor == 1:
        return gradient
    return _scaled_op(gradient, factor, backend)


@torch.library.custom_op("gad_fast::scaled_gradient", mutates_args=())
def _scaled_op(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """A new tensor: the one that is kept serves every backward pass."""
    scaled = torch.empty_like(gradient)
    scale_gradient(gradient, factor, scaled, backend)
    return scaled


@_scaled_op.register_fake
def _(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient)
