"""Other people's code on the same inputs in the same run, where it is installed.

A peer that cannot be imported, or does not run here, is a note and no failure. Some compute
something else of the same size: what, stands beside the figure.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_suite.cases import Case, Results, Row
from gpu_suite.data import TEMPERATURE, Tokens
from gpu_suite.kernels import ON_HEADS_TARGETS, ON_LOGITS_TARGETS, Target, prepared
from gpu_suite.operations import CLIP, KL_COEF, ON_HEADS, ON_LOGITS, Operation
from gpu_suite.scale import Scale, Shape
from gpu_suite.timing import measure


class Peer(NamedTuple):
    """Somebody's version of one of our operations."""

    by: str
    package: str
    op: str
    run: Operation
    note: str = ""


def trl_logprobs(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """TRL's own kernel, where it has Triton."""
    selective_log_softmax = _imported("trl.trainer.utils", "selective_log_softmax")
    return selective_log_softmax(logits, tokens.labels, temperature=TEMPERATURE)


def trl_logprobs_and_entropy(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """The same with the entropy."""
    selective_log_softmax_and_entropy = _imported(
        "trl.trainer.utils", "selective_log_softmax_and_entropy"
    )
    both = selective_log_softmax_and_entropy(logits, tokens.labels, temperature=TEMPERATURE)
    return torch.stack(both)


def trl_entropy(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """TRL's entropy, which knows no temperature."""
    entropy_from_logits = _imported("trl.trainer.utils", "entropy_from_logits")
    del tokens
    return entropy_from_logits(logits)


def liger_policy_loss_from_logits(logits: Tensor, _: Tensor | None, tokens: Tokens) -> Tensor:
    """Liger's GRPO in Triton; it leaves out the last row of a sequence of L + 1."""
    triton_grpo_loss = _imported("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    losses, *_rest = triton_grpo_loss(
        logits[None], tokens.old_logp[None, :-1], tokens.ref_logp[None, :-1],
        tokens.labels[None, :-1], tokens.advantages[:1], temperature=TEMPERATURE, beta=KL_COEF,
        eps_low=CLIP, eps_high=CLIP, inplace=False,
    )  # fmt: skip
    return losses


def liger_cross_entropy(hidden: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """Liger's fused linear cross-entropy: the same three products, a simpler loss."""
    liger_fused_linear_cross_entropy = _imported(
        "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    )
    return liger_fused_linear_cross_entropy(hidden, weight, tokens.labels)


def liger_grpo(hidden: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """Liger's chunked GRPO, in torch, as 8 sequences."""
    make_loss = _imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    loss = make_loss(
        beta=KL_COEF, compiled=False, temperature=TEMPERATURE, epsilon_low=CLIP, epsilon_high=CLIP
    )
    sequences = hidden.unflatten(0, (8, -1))
    B, L = sequences.shape[:2]
    labels, old, ref = (x.view(B, L) for x in (tokens.labels, tokens.old_logp, tokens.ref_logp))
    mask = torch.ones(B, L, device=hidden.device)
    return loss(
        sequences, weight, labels, mask, tokens.advantages[:B],
        ref_per_token_logps=ref, old_per_token_logps=old,
    )[0]  # fmt: skip


def cut_cross_entropy(hidden: Tensor, weight: Tensor | None, tokens: Tokens) -> Tensor:
    """Apple's cut cross-entropy for each token; it skips small gradients, unless told not to."""
    linear_cross_entropy = _imported("cut_cross_entropy", "linear_cross_entropy")
    return linear_cross_entropy(hidden, weight, tokens.labels, reduction="none", filter_eps=None)


PEERS = (
    Peer("trl", "trl", "token_logprobs", trl_logprobs),
    Peer("trl", "trl", "token_logprobs+entropy", trl_logprobs_and_entropy),
    Peer("trl", "trl", "entropy_from_logits", trl_entropy),
    Peer("liger", "liger_kernel", "policy_loss_from_logits", liger_policy_loss_from_logits),
    Peer("liger", "liger_kernel", "linear_policy_loss", liger_cross_entropy, "cross-entropy"),
    Peer("liger grpo", "liger_kernel", "linear_policy_loss", liger_grpo),
    Peer("cce", "cut_cross_entropy", "linear_token_logprobs", cut_cross_entropy),
)


def cases(scale: Scale, results: Results) -> list[Case]:
    """Plain torch, the installed peers, and last, since compiling takes long, torch.compile."""
    del results
    pairs = {**ON_LOGITS, **ON_HEADS}
    pairs = {**ON_LOGITS, **ON_HEADS}
    peers = [*(Peer("plain torch", "torch", op, pair.plain) for op, pair in pairs.items()), *PEERS]
    if scale.has_compiled_peers:
        peers += [
            Peer("torch.compile", "torch", op, torch.compile(pair.plain))
            for op, pair in pairs.items()
        ]
    return [
        Case(
            f"{peer.by}: {target} {shape}",
            functools.partial(_time, peer, target, shape, scale),
            is_optional=True,
        )
        for peer in peers
        for shape, targets in (
            (scale.peer_logits, ON_LOGITS_TARGETS),
            (scale.peer_head, ON_HEADS_TARGETS),
        )
        for target in targets
        if target.op == peer.op
    ]


def _time(peer: Peer, target: Target, shape: Shape, scale: Scale) -> list[Row]:
    if importlib.util.find_spec(peer.package) is None:
        raise ImportError(f"{peer.package} is not installed")
    found = measure(prepared(peer.run, target, shape, scale), scale)
    return [
        {
            "by": peer.by,
            "op": target.op,
            "part": target.part,
            "is_frozen": target.is_frozen,
            "shape": str(shape),
            "ms": found.milliseconds,
            "spread": found.spread,
            "peak_gib": found.peak_gib,
            "note": peer.note,
        }
    ]


def _imported(module: str, name: str) -> Any:
    # Only when called: the packages may be missing.
    return getattr(importlib.import_module(module), name)
