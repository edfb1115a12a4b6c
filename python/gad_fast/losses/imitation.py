"""The warm-up loss: cross-entropy of the teacher's responses."""

from torch import Tensor


def imitation_loss(logprobs: Tensor, *, num_tokens: int) -> Tensor:
    """Token-mean negative log-likelihood of a micro-batch's share of the step.

    Args:
        logprobs: Float [T], log-probability of each teacher token at temperature 1.
        num_tokens: teacher tokens of the whole step, over all micro-batches.

    Returns:
        A scalar; the losses of a step's micro-batches add up to the token-mean of the step.

    Source: paper section 2.2 (warm-up).
    """
    return -logprobs.sum() / num_tokens
