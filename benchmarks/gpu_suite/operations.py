"""The operations on logits and on heads, each beside the same maths in plain torch.

Every operation takes a leaf, what else is shared by its tokens, and the tokens; it gives a number
for each token, `[..., T]`, or a loss. The plain version is the truth in float64, and in the
dtype of the inputs what one would write by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast import kernels
from gpu_suite.data import TEMPERATURE, Tokens

CLIP = 0.2
KL_COEF = 0.05

Operation = Callable[[Tensor, Tensor | None, Tokens], Tensor]
"""Of logits [T, V] and no weight, or of hidden states [T, D] and the head's weight [V, D]."""


class Pair(NamedTuple):
    """An operation of the package, and what it should compute."""

    ours: Operation
    plain: Operation


def token_logprobs(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """[T]."""
    return kernels.token_logprobs(logits, tokens.labels, temperature=TEMPERATURE, mask=tokens.mask)


def token_logprobs_and_entropy(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """[2, T]."""
    both = kernels.token_logprobs(
        logits, tokens.labels, temperature=TEMPERATURE, mask=tokens.mask, return_entropy=True
    )
    return torch.stack(both)


def entropy_from_logits(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """[T]."""
    return kernels.entropy_from_logits(logits, temperature=TEMPERATURE, mask=tokens.mask)


def policy_loss_from_logits(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """A loss."""
    loss, _metrics = kernels.policy_loss_from_logits(
        logits, tokens.labels, tokens.old_logp, tokens.advantages, tokens.mask,
        temperature=TEMPERATURE, ref_logp=tokens.ref_logp, kl_coef=KL_COEF,
        clip_low=CLIP, clip_high=CLIP, num_tokens=tokens.num_tokens,
    )  # fmt: skip
    return loss


def linear_token_logprobs(hidden: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """[T]."""
    assert weight is not None
    return kernels.linear_token_logprobs(
        hidden, weight, tokens.labels, temperature=TEMPERATURE, mask=tokens.mask
    )


def linear_token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor | None, tokens: Tokens
) -> Tensor:
    """[2, T]."""
    assert weight is not None
    both = kernels.linear_token_logprobs(
        hidden, weight, tokens.labels, temperature=TEMPERATURE, mask=tokens.mask,
        return_entropy=True,
    )  # fmt: skip
    return torch.stack(both)


def linear_policy_loss(hidden: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """A loss."""
    assert weight is not None
    loss, _metrics = kernels.linear_policy_loss(
        hidden, weight, tokens.labels, tokens.old_logp, tokens.advantages, tokens.mask,
        temperature=TEMPERATURE, ref_logp=tokens.ref_logp, kl_coef=KL_COEF,
        clip_low=CLIP, clip_high=CLIP, num_tokens=tokens.num_tokens,
    )  # fmt: skip
    return loss


def plain_log_p(x: Tensor, weight: Tensor | None) -> Tensor:
    """Log-probabilities of the whole vocabulary, [T, V], in float32 at least."""
    logits = x if weight is None else x @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits / TEMPERATURE, -1)


def plain_logprobs(x: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """[T]."""
    return _kept(_gathered(plain_log_p(x, weight), tokens), tokens)


def plain_entropy(x: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """[T]."""
    return _kept(_entropy(plain_log_p(x, weight)), tokens)


def plain_logprobs_and_entropy(x: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """[2, T]."""
    log_p = plain_log_p(x, weight)
    both = (_gathered(log_p, tokens), _entropy(log_p))
    return torch.stack([_kept(values, tokens) for values in both])


def plain_policy_loss(x: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """A loss."""
    return policy_loss_of(_gathered(plain_log_p(x, weight), tokens), tokens)


def policy_loss_of(logp: Tensor, tokens: Tokens) -> Tensor:
    """PPO's clipped loss with a k3 estimate of KL, token mean.

    Source: Schulman et al. 2017, Eq. 7; Schulman, Approximating KL divergence, estimator k3.
    """
    ratio = (logp - tokens.old_logp).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)
    d = tokens.ref_logp - logp
    return _kept(KL_COEF * (d.exp() - d - 1) - gain, tokens).sum() / tokens.num_tokens


ON_LOGITS = {
    "token_logprobs": Pair(token_logprobs, plain_logprobs),
    "token_logprobs+entropy": Pair(token_logprobs_and_entropy, plain_logprobs_and_entropy),
    "entropy_from_logits": Pair(entropy_from_logits, plain_entropy),
    "policy_loss_from_logits": Pair(policy_loss_from_logits, plain_policy_loss),
}
ON_HEADS = {
    "linear_token_logprobs": Pair(linear_token_logprobs, plain_logprobs),
    "linear_token_logprobs+entropy": Pair(
        linear_token_logprobs_and_entropy, plain_logprobs_and_entropy
    ),
    "linear_policy_loss": Pair(linear_policy_loss, plain_policy_loss),
}


def _gathered(log_p: Tensor, tokens: Tokens) -> Tensor:
    return log_p.gather(-1, tokens.labels.clamp_min(0)[:, None]).squeeze(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _kept(values: Tensor, tokens: Tokens) -> Tensor:
    return values if tokens.mask is None else torch.where(tokens.mask, values, 0.0)
