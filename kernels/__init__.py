"""Fused log-probabilities, policy losses and scores: Triton kernels with a torch path beside each.

The folder knows tensors only: no model, no trainer and nothing else of the package; its functions
serve any trainer. Each runs its Triton kernels on CUDA and its torch path elsewhere, also where
Triton is not installed (macOS).

    from logits     token_logprobs, entropy_from_logits, policy_loss_from_logits
    from hidden     linear_token_logprobs, linear_policy_loss, FusedLMHead
    from log-probs  policy_loss
    from scores     group_advantages, last_token_score, bradley_terry_loss
"""

from gad_fast.kernels.bradley_terry_loss import bradley_terry_loss
from gad_fast.kernels.entropy_from_logits import entropy_from_logits
from gad_fast.kernels.fused_lm_head import FusedLMHead
from gad_fast.kernels.group_advantages import group_advantages
from gad_fast.kernels.last_token_score import last_token_score
from gad_fast.kernels.linear_policy_loss import linear_policy_loss
from gad_fast.kernels.linear_token_logprobs import linear_token_logprobs
from gad_fast.kernels.policy_inputs import PolicyOptions
from gad_fast.kernels.policy_loss import policy_loss
from gad_fast.kernels.policy_loss_from_logits import policy_loss_from_logits
from gad_fast.kernels.token_logprobs import token_logprobs, token_logprobs_reference

selective_log_softmax = token_logprobs
"""The name that TRL and verl users know."""

__all__ = [
    "FusedLMHead",
    "PolicyOptions",
    "bradley_terry_loss",
    "entropy_from_logits",
    "group_advantages",
    "last_token_score",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "policy_loss_from_logits",
    "selective_log_softmax",
    "token_logprobs",
    "token_logprobs_reference",
]
