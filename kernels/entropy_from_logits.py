"""Entropy of the distribution that each row of logits gives; the maths is in token_logprobs.py."""

import torch
from torch import Tensor

from gad_fast.kernels.backend import Backend
from gad_fast.kernels.token_logprobs import row_logits, token_logprobs


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats, differentiable once.

    Args:
        logits: `[..., V]`.
        temperature: above 0, one for all or `[...]`; divides the logits.
        mask: `[...]`; rows where it is 0 may hold anything, and give 0 with a gradient of 0.
        logit_scale: above 0; multiplies the logits before all else.
        softcap: above 0; then makes `softcap * tanh(logits / softcap)` of them. None for no cap.
        backend: "auto" is "triton" for float32 or bfloat16 on CUDA where Triton is installed.

    Returns:
        `[...]` in float32, or float64 for float64 logits.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    row_logits(logits, is_inplace=False)
    # The kernel looks at one label in passing; any will do.
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, entropy = token_logprobs(
        logits,
        labels,
        return_entropy=True,
        temperature=temperature,
        mask=mask,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    return entropy
