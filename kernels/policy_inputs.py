"""From a user's arguments to what every policy loss works on: flat tokens, each with one weight.

Each aggregation becomes one weight a token, with m the mask, n_s the kept tokens of its sequence s,
N = num_tokens, S = num_seqs and L = constant_length:

    token-mean               m / N
    seq-mean-token-mean      m / (n_s S)
    seq-mean-token-sum       m / S
    seq-mean-token-sum-norm  m / (S L)

N and S are by default those of the call. Where a step is cut into micro-batches or spread over
ranks, pass those of the whole step, and the losses and gradients of the parts add up to its own.
"""

from typing import Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from gad_fast.kernels.arguments import check_choice, check_device, flat_floats
from gad_fast.kernels.policy_objective import KLType, LossType, PolicyObjective, Terms
from gad_fast.kernels.sequences import Sequences

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
RatioLevel = Literal["token", "sequence"]


class PolicyOptions(TypedDict, total=False):
    """The keywords that every policy loss takes beside its own, with what they are if left out.

    Args:
        ref_logp: `[...]`, under the reference, or None; must be given if `kl_coef` is not 0.
        clip_low: 0.2, in [0, 1]; the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_high: 0.2, at least 0.
        clip_ratio_c: None, or above 1: the dual clip's bound.
        kl_coef: 0.0, at least 0; weight of the KL estimate.
        kl_type: "k3"; the estimator, of "k1", "k2", "k3" and "k3+".
        entropy_coef: 0.0; weight of the entropy bonus.
        ratio_level: "token", or "sequence" for GSPO's ratio.
        loss_type: "ppo", or "cispo" or "reinforce".
        agg: "token-mean", or "seq-mean-token-mean", "seq-mean-token-sum" and, with
            `constant_length`, "seq-mean-token-sum-norm", which need `[B, L]` or `cu_seqlens`.
        num_tokens: None counts those of the call; else what to divide by, those of the whole step
            where this call is a part of it, a number or a tensor on the device.
        num_seqs: likewise, for the aggregations over sequences.
        constant_length: None, or the L of "seq-mean-token-sum-norm".
        rollout_is_weights: None, or `[...]`: factors of the policy gradient (not of KL and entropy)
            that make up for a sampler whose probabilities are not the old policy's.
        cu_seqlens: None, or int `[S + 1]`: where each sequence of packed tokens starts, and T.
    """

    ref_logp: Tensor | None
    clip_low: float
    clip_high: float
    clip_ratio_c: float | None
    kl_coef: float
    kl_type: KLType
    entropy_coef: float
    ratio_level: RatioLevel
    loss_type: LossType
    agg: Aggregation
    num_tokens: float | Tensor | None
    num_seqs: float | Tensor | None
    constant_length: float | None
    rollout_is_weights: Tensor | None
    cu_seqlens: Tensor | None


class PolicyInputs(NamedTuple):
    """What a loss knows of T tokens beside their logits; in the order operations take them."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    advantages: Tensor
    weights: Tensor
    is_weights: Tensor | None

    def of(self, rows: slice | Tensor) -> "PolicyInputs":
        """Those of some of the tokens."""
        return PolicyInputs(*(None if x is None else x[rows] for x in self))  # pyright: ignore[reportArgumentType]


def policy_inputs(
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    options: PolicyOptions,
) -> PolicyInputs:
    """Flat inputs [T] in the dtype of the loss; raises ValueError for what does not fit.

    Args:
        old_logp: `[...]`, or None on-policy.
        advantages: `[...]`, or one for each sequence.
        mask: flat bool [T], or None to keep all.
        shape: that of the labels, `[...]`.
        device: that of the labels.
        dtype: float32, or float64.
        options: the rest.
    """
    cu_seqlens = options.get("cu_seqlens")
    if cu_seqlens is not None:
        check_device("cu_seqlens", cu_seqlens, device)
    sequences = Sequences(shape, cu_seqlens)

    def flat(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return flat_floats(name, tensor.detach(), shape, device, dtype)

    if sequences.are_known and advantages.shape == (sequences.count,) != shape:
        advantages = sequences.spread(advantages).reshape(shape)
    kept = torch.ones(shape.numel(), device=device) if mask is None else mask
    weights = token_weights(kept.to(dtype), sequences, options)
    return PolicyInputs(
        flat("old_logp", old_logp),
        flat("ref_logp", options.get("ref_logp")),
        flat_floats("advantages", advantages.detach(), shape, device, dtype),
        weights,
        flat("rollout_is_weights", options.get("rollout_is_weights")),
    )


def policy_objective(options: PolicyOptions) -> PolicyObjective:
    """The checked objective; raises TypeError for an option that there is not, as Python would."""
    unknown = options.keys() - PolicyOptions.__annotations__.keys()
    if unknown:
        msg = (
            f"unexpected option {min(unknown)!r} (help(gad_fast.kernels.PolicyOptions) lists them)"
        )
        raise TypeError(msg)
    chosen = {key: options[key] for key in PolicyObjective._fields if key in options}
    objective = PolicyObjective(**chosen)
    objective.check(has_reference=options.get("ref_logp") is not None)
    check_choice("ratio_level", options.get("ratio_level", "token"), get_args(RatioLevel))
    return objective


def token_weights(kept: Tensor, sequences: Sequences, options: PolicyOptions) -> Tensor:
    """Weight of each token, [T]: mask and aggregation as one number.

    Args:
        kept: the mask as 0 and 1, float [T].
        sequences: which tokens belong together.
        options: of which `agg` and the normalisers count.

    Raises:
        ValueError: an unknown aggregation, one over sequences without a way to tell them apart, or
            a constant length missing or of no use.
    """
    agg = options.get("agg", "token-mean")
    check_choice("agg", agg, get_args(Aggregation))
    constant_length = options.get("constant_length")
    if (constant_length is not None) != (agg == "seq-mean-token-sum-norm"):
        msg = f"constant_length goes with agg='seq-mean-token-sum-norm', got {constant_length} "
        raise ValueError(msg + f"with {agg!r}")
    if agg == "token-mean":
        num_tokens = options.get("num_tokens")
        return kept / (kept.sum().clamp_min(1) if num_tokens is None else num_tokens)
    require_sequences(sequences, f"agg={agg!r}")
    lengths = sequences.sums(kept)
    num_seqs = options.get("num_seqs")
    # A sequence of which nothing is kept is no sequence.
    weights = kept / ((lengths > 0).sum().clamp_min(1) if num_seqs is None else num_seqs)
    if agg == "seq-mean-token-mean":
        return weights / sequences.spread(lengths.clamp_min(1))
    return weights if constant_length is None else weights / constant_length


def sequence_level_old_logp(
    logp: Tensor, old_logp: Tensor, kept: Tensor, sequences: Sequences
) -> Tensor:
    """Old log-probabilities [T] that make every token's ratio that of its sequence.

    GSPO's ratio is exp(mean over the sequence of l - l_old). With l - mean(l - l_old) in place of
    l_old each token has that ratio, and its gradient is GSPO's, because the weight of a token is
    the same throughout a sequence.

    Source: GSPO, arXiv 2507.18071, section 4 (its GSPO-token form where advantages differ).
    """
    require_sequences(sequences, "ratio_level='sequence'")
    weights = kept.to(logp.dtype)
    log_ratio = torch.where(weights > 0, logp - old_logp, 0.0)
    mean = sequences.sums(log_ratio) / sequences.sums(weights).clamp_min(1)
    return logp - sequences.spread(mean)


def require_sequences(sequences: Sequences, what: str) -> None:
    """Raises ValueError where nothing tells which tokens are of one sequence."""
    if not sequences.are_known:
        msg = (
            f"{what} must know the sequences: pass [B, L], or cu_seqlens with flat tokens; "
            f"got shape {tuple(sequences.shape)}"
        )
        raise ValueError(msg)


def summarize(terms: Tensor, mask: Tensor | None, num_tokens: int) -> dict[str, Tensor]:
    """Means over the kept tokens of a call, 0-dim on its device; none of them waits for it.

    They go by the mask and not by the weights, so that no aggregation changes what they mean.

    Args:
        terms: [NUM_TERMS, T].
        mask: bool [T], or None.
        num_tokens: T.
    """
    terms = terms.detach()
    kept = terms.new_ones(num_tokens) if mask is None else mask.to(terms.dtype)
    count = kept.sum()
    used = torch.where(kept > 0, terms, 0.0)
    means = Terms(*(used.sum(1) / count.clamp_min(1)).unbind())
    each = Terms(*used.unbind())
    is_any = count > 0
    infinity = float("inf")
    return {
        "pg_loss": means.pg,
        "kl": means.kl,
        "entropy": means.entropy,
        "ratio_mean": means.ratio,
        "ratio_min": _or_zero(torch.where(kept > 0, each.ratio, infinity), is_any, "min"),
        "ratio_max": _or_zero(torch.where(kept > 0, each.ratio, -infinity), is_any, "max"),
        "approx_kl": -means.log_ratio,
        "approx_kl_k3": means.ratio - (kept / count.clamp_min(1)).sum() - means.log_ratio,
        "clip_fraction_low": means.is_clipped_low,
        "clip_fraction_high": means.is_clipped_high,
        "clip_fraction_dual": means.is_clipped_dual,
        "num_tokens": count,
    }


def _or_zero(values: Tensor, is_any: Tensor, kind: Literal["min", "max"]) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    extreme = values.amin() if kind == "min" else values.amax()
    return torch.where(is_any, extreme, 0.0)
