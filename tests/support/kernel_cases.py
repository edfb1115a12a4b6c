"""Inputs and markers that the tests of all kernels share.

The logits are peaked, as those of a trained model are: on flat logits a phantom token in the tail,
or a rounded p - 1 at the label, is too small to be seen.
"""

import pytest
import torch
from torch import Tensor

from gad_fast.kernels.optional_triton import HAS_TRITON, IS_INTERPRETED

DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"
CAN_RUN_TRITON = HAS_TRITON and (IS_INTERPRETED or DEVICE == "cuda")
needs_triton = pytest.mark.skipif(not CAN_RUN_TRITON, reason="Triton cannot run here")
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_triton), "torch"]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# In blocks of 128: a tail of one column, of most of a block, and of a few columns (50257 is the
# same residue as 785 modulo 16, so that no row after the first is aligned).
each_vocabulary = pytest.mark.parametrize("V", [257, 1000, 785])

TEMPERATURE = 0.8


def peaked(
    T: int, V: int, dtype: torch.dtype = torch.float32, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Logits whose largest p goes from 0.999 down to 0.3, and labels, two in three that token."""
    generator = torch.Generator().manual_seed(T * V)
    logits = 4.0 * torch.randn(T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=generator)
    labels[0] = V - 1
    p = torch.linspace(0.999, 0.3, T, dtype=torch.float64)
    rest = torch.logsumexp(logits / temperature, -1)
    logits[torch.arange(T), labels] = temperature * (rest + torch.log(p / (1 - p)))
    labels[2::3] = (labels[2::3] + 1) % V
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def peaked_head(
    T: int, D: int, V: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [T, D] and weight [V, D] with peaked logits, and labels, two in three the peak."""
    generator = torch.Generator().manual_seed(T * D * V)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=generator)
    labels[0] = V - 1
    # Hidden states point at their label's row: the further, the more peaked.
    reach = torch.linspace(12.0, 4.0, T, dtype=torch.float64)[:, None]
    hidden = reach * weight[labels] / D + 0.3 * torch.randn(
        T, D, generator=generator, dtype=torch.float64
    )
    labels[2::3] = (labels[2::3] + 1) % V
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()
