"""The student's loss in the game: policy gradient on the advantages, with KL to a reference."""

from typing import NamedTuple

from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Bound of the log-ratio inside the KL estimate, before `exp` (official code)."""
KL_BOUND = 10.0
"""Bound of the KL estimate of one token (official code)."""


class PolicyLoss(NamedTuple):
    """A micro-batch's share of the student's loss."""

    loss: Tensor
    """Scalar to differentiate."""
    kl: Tensor
    """Scalar, the token-mean KL estimate without its coefficient; detached."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    reference_logprobs: Tensor | None,
    kl_coef: float,
    num_tokens: int,
) -> PolicyLoss:
    """Token-mean policy-gradient loss of strictly on-policy rollouts.

    One update is made for each batch of rollouts, so the probability ratio to the sampling policy
    is 1 and PPO's clip is inactive: the ratio appears as `exp(l - stopgrad(l))`, with value 1
    and gradient of the log-probability.

    Args:
        logprobs: Float [T], log-probability of each rollout token at the sampling temperature.
        advantages: Float [T], the advantage of the rollout to which the token belongs.
        reference_logprobs: Float [T] of the frozen student after warm-up, or None without KL.
        kl_coef: weight of the KL estimate.
        num_tokens: rollout tokens of the whole step, over all micro-batches.

    Returns:
        The loss, -A * ratio + kl_coef * k3 summed over T and divided by `num_tokens`, and the KL.

    Source: paper appendix A.1 and A.2; k3 and its bounds as in the official code.
    """
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(advantages * ratio).sum() / num_tokens
    if reference_logprobs is None:
        return PolicyLoss(loss, logprobs.new_zeros(()))
    kl = k3(logprobs, reference_logprobs).sum() / num_tokens
    return PolicyLoss(loss + kl_coef * kl, kl.detach())


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(student || reference) on the student's samples: never negative.

    Args:
        logprobs: Float [T] of the student.
        reference_logprobs: Float [T] of the reference.

    Returns:
        Float [T], exp(d) - d - 1 with d = reference - student.

    Source: the k3 estimator, "low_var_kl" in the official code.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (log_ratio.exp() - log_ratio - 1).clamp(-KL_BOUND, KL_BOUND)
