"""The policy loss of one chunk of tokens, and the gradient of its logits: the ways to have them.

`torch_chunk` runs anywhere. The kernels have two ways, both with nothing wider than bfloat16 in
memory: `tile_chunk` makes the logits tile by tile and keeps their exponentials relative to each
tile's largest, so that log-probabilities are exact and the gradient has the relative precision of
bfloat16; `rounded_chunk` rounds the logits themselves, as an engine with a bfloat16 head does.

Shapes: C tokens of a chunk, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast.kernels.linear_head import LinearHead
from gad_fast.kernels.linear_tiles import exp_to_grad, linear_grad_slice, linear_stats
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_loss import launch_policy_loss
from gad_fast.kernels.policy_objective import PolicyObjective
from gad_fast.kernels.policy_row_kernel import launch_policy_rows
from gad_fast.kernels.policy_rows import torch_policy_rows


class Tokens(NamedTuple):
    """Tokens that reach the head, flat."""

    hidden: Tensor
    """[T, D]."""
    labels: Tensor
    inverse_temperature: Tensor
    inputs: PolicyInputs

    def take(self, rows: slice | Tensor) -> "Tokens":
        """Some of the tokens, by a slice or by indices."""
        return Tokens(
            self.hidden[rows],
            self.labels[rows],
            self.inverse_temperature[rows],
            self.inputs.of(rows),
        )


class ChunkSettings(NamedTuple):
    """What is the same for all chunks of a call."""

    head: LinearHead
    objective: PolicyObjective
    logits_dtype: str
    needs_grad: bool


def torch_chunk(chunk: Tokens, settings: ChunkSettings) -> tuple[Tensor, Tensor | None]:
    """Terms [NUM_TERMS, C] and, where wanted, the gradient [C, V] of the logits."""
    head, objective, logits_dtype, needs_grad = settings
    logits = head.logits(chunk.hidden, logits_dtype)
    grad_logits = None
    if needs_grad:
        is_same = logits.dtype == chunk.hidden.dtype
        grad_logits = logits if is_same else torch.empty_like(logits, dtype=chunk.hidden.dtype)
    scaling = head.scaling(chunk.inverse_temperature)
    terms = torch_policy_rows(logits, chunk.labels, scaling, chunk.inputs, objective, grad_logits)
    return terms, grad_logits


def tile_chunk(chunk: Tokens, settings: ChunkSettings) -> tuple[Tensor, Tensor | None]:
    """The same from the tile kernels, with logits that are exact and never there."""
    head, objective, logits_dtype, needs_grad = settings
    tokens = (head, chunk.labels, chunk.inverse_temperature)
    # Under a softcap the derivative needs the logits themselves, which are then made once more.
    is_kept = needs_grad and head.softcap is None
    shape = (chunk.hidden.shape[0], head.weight.shape[0])
    exponentials = chunk.hidden.new_empty(shape) if is_kept else None
    stats, tile_maximum = linear_stats(
        chunk.hidden, *tokens, logits_dtype=logits_dtype, exponentials=exponentials
    )
    terms, grad_logp = launch_policy_loss(stats.logp, stats.entropy, chunk.inputs, objective)
    if not needs_grad:
        return terms, None
    has_bonus = objective.entropy_coef != 0
    grad_entropy = -objective.entropy_coef * chunk.inputs.weights if has_bonus else None
    upstream = (grad_logp, grad_entropy)
    if exponentials is not None:
        return terms, exp_to_grad(exponentials, *tokens, stats, tile_maximum, *upstream)
    columns = slice(0, shape[1])
    return terms, linear_grad_slice(
        chunk.hidden, *tokens, stats, *upstream, columns, logits_dtype=logits_dtype
    )


def rounded_chunk(chunk: Tokens, settings: ChunkSettings) -> tuple[Tensor, Tensor | None]:
    """The same from logits in bfloat16, which the gradient then overwrites."""
    head, objective, _, needs_grad = settings
    if head.bias is None:
        logits = chunk.hidden @ head.weight.t()
    else:
        logits = torch.addmm(head.bias.to(chunk.hidden.dtype), chunk.hidden, head.weight.t())
    scaling = head.scaling(chunk.inverse_temperature)
    grad_logits = logits if needs_grad else None
    terms = launch_policy_rows(logits, chunk.labels, scaling, chunk.inputs, objective, grad_logits)
    return terms, grad_logits
