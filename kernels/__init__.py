"""Fused operations on logits, as Triton kernels with a plain torch path beside each.

The folder knows tensors only: no model, no trainer and nothing else of the package. Where Triton is
not installed (macOS), importing works and every operation takes its torch path.
"""

from gad_fast.kernels.token_logprobs import token_logprobs, token_logprobs_reference

__all__ = ["token_logprobs", "token_logprobs_reference"]
