"""The policy loss of rows of logits and their gradient, in torch: the path of a CPU.

The kernels' one pass, in the order in which a cache likes it: every row is read, judged and
differentiated while it is there, and its exponentials become its gradient in place.

Shapes: T tokens, V vocabulary, C rows of a block.
"""

import torch
from torch import Tensor

from gad_fast.kernels.chunked_torch import LOWEST_LOG_P, Scaling, row_chunks
from gad_fast.kernels.policy_inputs import PolicyInputs
from gad_fast.kernels.policy_objective import NUM_TERMS, PolicyObjective, token_terms


def torch_policy_rows(
    logits: Tensor,
    labels: Tensor,
    scaling: Scaling,
    inputs: PolicyInputs,
    objective: PolicyObjective,
    grad_logits: Tensor | None,
) -> Tensor:
    """Terms [NUM_TERMS, T]; where there is room for it, writes the gradient of the logits.

    Args:
        logits: `[T, V]`.
        labels: `[T]`; anything where the weight is 0.
        scaling: of the rows.
        inputs: of the rows; where their weight is 0 the logits may hold anything.
        objective: what to compute.
        grad_logits: `[T, V]`, which may be the logits, or None.
    """
    terms = inputs.weights.new_empty(NUM_TERMS, logits.shape[0])
    for rows in row_chunks(logits):
        x = _owned_rows(logits[rows], inputs.weights[rows], terms.dtype)
        terms[:, rows], gradient = _block(
            x, labels[rows], scaling.of(rows), inputs.of(rows), objective, grad_logits is not None
        )
        if grad_logits is not None:
            grad_logits[rows] = gradient
    return terms


def _owned_rows(logits: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [C, V] in the dtype of the loss, with zeros in rows of no weight."""
    x = logits.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # Only where there are such rows, as far as a look is free: it is a pass over all of them.
    is_unused = weights == 0
    return x.masked_fill_(is_unused[:, None], 0.0) if x.is_cuda or is_unused.any() else x


def _block(
    z: Tensor,
    labels: Tensor,
    scaling: Scaling,
    inputs: PolicyInputs,
    objective: PolicyObjective,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Terms [NUM_TERMS, C], and the gradient [C, V] or what was to become it; overwrites z."""
    chain = scaling.cap_(z)
    # In the order of `row_statistics`, so that a reference with the same weights has the same bits.
    z.sub_(z.amax(-1, keepdim=True)).mul_(scaling.factor())
    index = labels.clamp(0, z.shape[1] - 1)[:, None]
    label_z = z.gather(-1, index).squeeze(-1).masked_fill_(index.squeeze(-1) != labels, torch.nan)
    e = z.exp()
    total = e.sum(-1)
    log_total = total.log()
    z.clamp_(min=LOWEST_LOG_P)
    entropy = log_total - torch.linalg.vecdot(e, z) / total
    terms, grad_logp = token_terms(label_z - log_total, entropy, *inputs, objective)
    if not needs_grad:
        return terms, e
    # From here e becomes the gradient: g (1[y] - p) + c w p (log p + H), times the chain factor.
    slope = scaling.slope()
    g = (grad_logp * slope)[:, None]
    if objective.entropy_coef == 0:
        e *= -g / total[:, None]
    else:
        bonus = (objective.entropy_coef * inputs.weights * slope)[:, None]
        e *= z.add_((entropy - log_total)[:, None]).mul_(bonus).sub_(g)
        e /= total[:, None]
    e.scatter_add_(-1, index, g)
    return terms, e if chain is None else e.mul_(chain)
