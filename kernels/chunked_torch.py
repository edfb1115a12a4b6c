"""The torch path of `token_logprobs`: what runs on a CPU, and wherever Triton cannot.

Rows are worked on in chunks that stay in cache; the result does not depend on the chunk.
"""

from typing import Any

import torch
from torch import Tensor

# Rows are worked on in chunks of this size, so that each pass over a chunk finds it in cache.
_CHUNK_BYTES = 2 << 20
# exp() of anything lower is exactly 0, in float64 too, so that clamping there changes no product
# p * log p but 0 * -inf.
_LOWEST_LOG_P = -1000.0


class ChunkedTokenLogprobs(torch.autograd.Function):
    """The maths of token_logprobs.py, keeping for backward what its kernels keep.

    Autograd over log_softmax would hold an fp32 [T, V] copy, and several for the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, has_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities `[T]`, and the entropy `[T]` if it is asked for."""
        dtype = compute_dtype(logits)
        logprobs = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
        maximum, log_total = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if has_entropy else None
        for rows in _row_chunks(logits):
            x = logits[rows].to(dtype)  # [C, V]
            maximum[rows] = x.amax(-1)
            z = (x - maximum[rows, None]).div_(temperature)
            e = z.exp()
            total = e.sum(-1)
            log_total[rows] = total.log()
            logprobs[rows] = z.gather(-1, labels[rows, None]).squeeze(-1) - log_total[rows]
            if entropy is not None:
                e *= z.clamp_(min=_LOWEST_LOG_P)
                entropy[rows] = log_total[rows] - e.sum(-1) / total
        ctx.save_for_backward(logits, labels, entropy, maximum, log_total)
        ctx.temperature = temperature
        # Else an entropy that is only a metric would come back as zeros, and cost passes over V.
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides ctx)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        """Gradient of the logits, in their dtype."""
        grad_logprobs, grad_entropy = grad_outputs
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        logits, labels, entropy, maximum, log_total = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_total)
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows in _row_chunks(logits):
            x = logits[rows].to(maximum.dtype)  # [C, V]
            log_p = (x - maximum[rows, None]).div_(ctx.temperature).sub_(log_total[rows, None])
            grad = log_p.exp()
            grad_logp = grad_logprobs[rows, None] / ctx.temperature
            if grad_entropy is None:
                grad *= -grad_logp
            else:
                surprise = log_p.clamp_(min=_LOWEST_LOG_P).add_(entropy[rows, None])
                grad *= surprise.mul_(-grad_entropy[rows, None] / ctx.temperature).sub_(grad_logp)
            grad_logits[rows] = grad.scatter_add_(-1, labels[rows, None], grad_logp)
        return grad_logits, None, None, None


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def _row_chunks(logits: Tensor) -> list[slice]:
    T, V = logits.shape
    num_rows = max(1, _CHUNK_BYTES // (V * compute_dtype(logits).itemsize))
    return [slice(start, start + num_rows) for start in range(0, T, num_rows)]
