"""The student's loss at one token: the one definition that every path of the package shares.

For a token with log-probability l under the student, l_old under the policy that sampled it, l_ref
under the reference, and advantage A, write r = exp(min(l - l_old, 20)), which is 1 without l_old.

    ppo        pg = -min(r A, clip(r, 1 - low, 1 + high) A), for A < 0 no more than -c A (dual clip)
    cispo      pg = -sg(min(r, 1 + high)) A l
    reinforce  pg = -A l

With d = min(l_ref - l, 20), an estimate of KL(student || reference) on the student's own samples:

    k1  -d          k2  d^2 / 2          k3  e^d - d - 1          k3+  value of k3, gradient of k2

Rollout importance weight u (1 if absent), entropy H of the row, and weight w of the token, which
holds mask and aggregation (policy_inputs.py):

    loss = sum_t w_t (u_t pg_t + kl_coef kl_t - entropy_coef H_t)

Derivatives with respect to l, which is all that a kernel needs:

    ppo        -r A, 0 where the clipped arm is the larger loss, 0 where the dual clip binds
    cispo      -min(r, 1 + high) A
    reinforce  -A
    kl         k1: 1     k2, k3+: -d     k3: 1 - e^d

The bounds of 20 keep exp() finite; the derivatives are taken as if they were not there, at the
bounded value: a policy that has drifted so far must not lose the pull back.

Sources: PPO arXiv 1707.06347; asymmetric clip, DAPO 2503.14476; dual clip 1912.09729; CISPO
2506.13585; k1 to k3, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gad_fast.kernels.arguments import check_choice, check_range
from gad_fast.kernels.optional_triton import tl, triton

LossType = Literal["ppo", "cispo", "reinforce"]
KLType = Literal["k1", "k2", "k3", "k3+"]

MAX_LOG_RATIO = 20.0


class PolicyObjective(NamedTuple):
    """The choices that make the loss of a token; in the order in which the operations take them."""

    loss_type: LossType = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_ratio_c: float | None = None
    kl_coef: float = 0.0
    kl_type: KLType = "k3"
    entropy_coef: float = 0.0

    def check(self, *, has_reference: bool) -> None:
        """Raises ValueError for a choice that does not exist or a number out of range."""
        check_choice("loss_type", self.loss_type, get_args(LossType))
        check_choice("kl_type", self.kl_type, get_args(KLType))
        check_range("clip_low", self.clip_low, 0.0, 1.0)
        check_range("clip_high", self.clip_high, 0.0)
        check_range("kl_coef", self.kl_coef, 0.0)
        check_range("entropy_coef", self.entropy_coef, -float("inf"))
        if self.clip_ratio_c is not None:
            check_range("clip_ratio_c", self.clip_ratio_c, 1.0, is_open=True)
        if self.kl_coef != 0 and not has_reference:
            msg = f"ref_logp must be given when kl_coef is not 0, got kl_coef={self.kl_coef:g}"
            raise ValueError(msg)

    def check_entropy(self, entropy: Tensor | None) -> None:
        """Raises ValueError for a bonus on an entropy that is not there."""
        if entropy is None and self.entropy_coef != 0:
            msg = f"entropy must be given when entropy_coef is not 0, got {self.entropy_coef:g}"
            raise ValueError(msg)


class Terms(NamedTuple):
    """What is known of each token after its loss, each [T]; as a matrix, rows in this order."""

    loss: Tensor
    """The token's share of the loss, its weight included."""
    pg: Tensor
    kl: Tensor
    entropy: Tensor
    ratio: Tensor
    log_ratio: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    is_clipped_dual: Tensor


NUM_TERMS = len(Terms._fields)


def token_loss_reference(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    is_weights: Tensor | None,
    objective: PolicyObjective,
) -> Tensor:
    """Weighted loss [T] by the book, differentiated by autograd: the truth in tests."""
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    ratio = _bounded(log_ratio).exp()
    if objective.loss_type == "ppo":
        clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        pg = -torch.minimum(ratio * advantages, clipped * advantages)
        if objective.clip_ratio_c is not None:
            dual = torch.minimum(pg, -objective.clip_ratio_c * advantages)
            pg = torch.where(advantages < 0, dual, pg)
    elif objective.loss_type == "cispo":
        pg = -ratio.detach().clamp(max=1 + objective.clip_high) * advantages * logp
    else:
        pg = -advantages * logp
    loss = pg if is_weights is None else is_weights * pg
    if ref_logp is not None:
        d = _bounded(ref_logp - logp)
        kl = {
            "k1": -d,
            "k2": d.square() / 2,
            "k3": d.exp() - d - 1,
            "k3+": d.square() / 2 + (d.exp() - d - 1 - d.square() / 2).detach(),
        }[objective.kl_type]
        loss = loss + objective.kl_coef * kl
    if entropy is not None:
        loss = loss - objective.entropy_coef * entropy
    return weights * loss


def _bounded(x: Tensor) -> Tensor:
    """min(x, 20), whose derivative is 1 all the same."""
    return x + (x.clamp(max=MAX_LOG_RATIO) - x).detach()


def token_terms(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    is_weights: Tensor | None,
    objective: PolicyObjective,
) -> tuple[Tensor, Tensor]:
    """Terms as a matrix [NUM_TERMS, T], and the derivative [T] of the loss with respect to logp.

    Closed form of `token_loss_reference`, in the dtype of `logp`: the torch path.
    """
    no = torch.zeros_like(logp)
    log_ratio = no if old_logp is None else logp - old_logp
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    is_low = is_high = is_dual = no.bool()
    if objective.loss_type == "ppo":
        free = -ratio * advantages
        clipped = -ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages
        pg = torch.maximum(free, clipped)
        is_clipped = free < clipped
        grad = free.masked_fill(is_clipped, 0.0)
        is_low, is_high = is_clipped & (advantages < 0), is_clipped & (advantages > 0)
        if objective.clip_ratio_c is not None:
            bound = -objective.clip_ratio_c * advantages
            is_dual = (advantages < 0) & (pg > bound)
            pg, grad = torch.where(is_dual, bound, pg), grad.masked_fill(is_dual, 0.0)
    elif objective.loss_type == "cispo":
        is_high = ratio > 1 + objective.clip_high
        grad = -ratio.clamp(max=1 + objective.clip_high) * advantages
        pg = grad * logp
    else:
        grad = -advantages
        pg = grad * logp
    loss, grad = (pg, grad) if is_weights is None else (is_weights * pg, is_weights * grad)
    kl = no
    if ref_logp is not None:
        kl, grad_kl = _kl_terms(ref_logp - logp, objective.kl_type)
        loss, grad = loss + objective.kl_coef * kl, grad + objective.kl_coef * grad_kl
    if entropy is not None:
        loss = loss - objective.entropy_coef * entropy
    h = no if entropy is None else entropy
    flags = (x.to(logp.dtype) for x in (is_low, is_high, is_dual))
    # A token of weight 0 may hold anything, and 0 times that is not always 0.
    is_kept = weights != 0
    rows = [(weights * loss).where(is_kept, 0.0), pg, kl, h, ratio, log_ratio, *flags]
    return torch.stack(rows), (weights * grad).where(is_kept, 0.0)


def _kl_terms(d: Tensor, kl_type: str) -> tuple[Tensor, Tensor]:
    """KL estimate, and its derivative with respect to logp, for d = ref_logp - logp."""
    d = d.clamp(max=MAX_LOG_RATIO)
    if kl_type == "k1":
        return -d, torch.ones_like(d)
    if kl_type == "k2":
        return d.square() / 2, -d
    # expm1 keeps the small difference that a student near its reference has.
    growth = torch.expm1(d)
    return growth - d, -growth if kl_type == "k3" else -d


_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def policy_token(
    logp,
    entropy,
    old_logp,
    ref_logp,
    advantage,
    is_weight,
    clip_low,
    clip_high,
    clip_ratio_c,
    kl_coef,
    entropy_coef,
    LOSS_TYPE: tl.constexpr,
    KL_TYPE: tl.constexpr,  # None without a reference
    HAS_DUAL_CLIP: tl.constexpr,
):
    """`token_terms` without the weight, of a scalar or a block: (loss, grad, terms from pg on)."""
    log_ratio = logp - old_logp
    ratio = tl.exp(tl.minimum(log_ratio, _MAX_LOG_RATIO))
    no = ratio * 0.0
    is_low, is_high, is_dual = no, no, no
    if LOSS_TYPE == "ppo":
        free = -ratio * advantage
        bounded = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
        pg = tl.maximum(free, -bounded * advantage)
        is_clipped = tl.where(free < -bounded * advantage, 1.0, 0.0)
        grad = tl.where(is_clipped != 0, 0.0, free)
        is_low = tl.where(advantage < 0, is_clipped, 0.0)
        is_high = tl.where(advantage > 0, is_clipped, 0.0)
        if HAS_DUAL_CLIP:
            bound = -clip_ratio_c * advantage
            is_dual = tl.where((advantage < 0) & (pg > bound), 1.0, 0.0)
            pg = tl.where(is_dual != 0, bound, pg)
            grad = tl.where(is_dual != 0, 0.0, grad)
    elif LOSS_TYPE == "cispo":
        is_high = tl.where(ratio > 1 + clip_high, 1.0, 0.0)
        grad = -tl.minimum(ratio, 1 + clip_high) * advantage
        pg = grad * logp
    else:
        grad = -advantage + no
        pg = grad * logp
    kl = no
    grad_kl = no
    if KL_TYPE is not None:
        d = tl.minimum(ref_logp - logp, _MAX_LOG_RATIO)
        growth = _expm1(d)
        if KL_TYPE == "k1":
            kl, grad_kl = -d, no + 1.0
        elif KL_TYPE == "k2":
            kl, grad_kl = d * d * 0.5, -d
        elif KL_TYPE == "k3":
            kl, grad_kl = growth - d, -growth
        else:
            kl, grad_kl = growth - d, -d
    loss = is_weight * pg + kl_coef * kl - entropy_coef * entropy
    grad = is_weight * grad + kl_coef * grad_kl
    return loss, grad, pg, kl, ratio, log_ratio, is_low, is_high, is_dual


@triton.jit
def _expm1(x):
    """exp(x) - 1: by series near 0, where the difference would cancel."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def store_terms(
    terms,  # [NUM_TERMS, T]
    T,
    o_t,
    m_t,
    loss,
    pg,
    kl,
    entropy,
    ratio,
    log_ratio,
    is_low,
    is_high,
    is_dual,
):
    """Writes one column of the matrix of terms, or a block of them, in the order of `Terms`."""
    p_terms = terms + o_t
    tl.store(p_terms, loss, mask=m_t)
    tl.store(p_terms + T, pg, mask=m_t)
    tl.store(p_terms + 2 * T, kl, mask=m_t)
    tl.store(p_terms + 3 * T, entropy, mask=m_t)
    tl.store(p_terms + 4 * T, ratio, mask=m_t)
    tl.store(p_terms + 5 * T, log_ratio, mask=m_t)
    tl.store(p_terms + 6 * T, is_low, mask=m_t)
    tl.store(p_terms + 7 * T, is_high, mask=m_t)
    tl.store(p_terms + 8 * T, is_dual, mask=m_t)


def kernel_options(objective: PolicyObjective, *, has_reference: bool) -> dict[str, Any]:
    """The arguments of a launch that come from the objective, by the names kernels give them."""
    return {
        "clip_low": objective.clip_low,
        "clip_high": objective.clip_high,
        "clip_ratio_c": objective.clip_ratio_c or 0.0,
        "kl_coef": objective.kl_coef,
        "entropy_coef": objective.entropy_coef,
        "LOSS_TYPE": objective.loss_type,
        "KL_TYPE": objective.kl_type if has_reference else None,
        "HAS_DUAL_CLIP": objective.clip_ratio_c is not None,
    }
