"""What `gad-fast bench kernels` measures: a call of ours or a naive one, ready to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gad_fast import kernels

Shapes = tuple[int, int, int]
"""T tokens, D width, V vocabulary."""
Case = Callable[[torch.dtype, Shapes], Callable[[], None]]


def inputs(dtype: torch.dtype, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and advantages."""
    torch.manual_seed(0)
    T, D, V = shapes
    hidden = torch.randn(T, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (T,)), torch.randn(T)


def naive_loss(logits: Tensor, labels: Tensor, advantages: Tensor) -> Tensor:
    """What one writes by hand, and what TRL and verl do without a fused kernel."""
    logprobs = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return -(advantages * (logprobs - logprobs.detach()).exp()).mean()


def naive_from_hidden(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Head and loss, whole logits."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        loss = naive_loss(hidden @ weight.t(), labels, advantages)
        torch.autograd.grad(loss, [hidden, weight])

    return run


def linear_policy_loss(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Gradient in the forward pass."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        loss, _ = kernels.linear_policy_loss(hidden, weight, labels, None, advantages)
        torch.autograd.grad(loss, [hidden, weight])

    return run


def linear_token_logprobs(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Logits made again in the backward pass."""
    hidden, weight, labels, advantages = inputs(dtype, shapes)

    def run() -> None:
        logprobs = kernels.linear_token_logprobs(hidden, weight, labels)
        torch.autograd.grad(-(advantages * logprobs).mean(), [hidden, weight])

    return run


def _logits(dtype: torch.dtype, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, advantages = inputs(dtype, shapes)
    return (hidden @ weight.t()).detach().requires_grad_(), labels, advantages


def naive_from_logits(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """The loss alone, by hand."""
    logits, labels, advantages = _logits(dtype, shapes)
    return lambda: _discard(torch.autograd.grad(naive_loss(logits, labels, advantages), logits))


def policy_loss_from_logits(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """The loss alone, one pass."""
    logits, labels, advantages = _logits(dtype, shapes)

    def run() -> None:
        loss, _ = kernels.policy_loss_from_logits(logits, labels, None, advantages)
        torch.autograd.grad(loss, logits)

    return run


def token_logprobs(dtype: torch.dtype, shapes: Shapes) -> Callable[[], None]:
    """Log-probabilities, and a loss on them."""
    logits, labels, advantages = _logits(dtype, shapes)

    def run() -> None:
        logprobs = kernels.token_logprobs(logits, labels)
        torch.autograd.grad(-(advantages * logprobs).mean(), logits)

    return run


def _discard(_: object) -> None:
    return None


# What is measured, and what it is measured against.
CASES: dict[str, tuple[Case, str]] = {
    "naive_from_hidden": (naive_from_hidden, "naive_from_hidden"),
    "linear_policy_loss": (linear_policy_loss, "naive_from_hidden"),
    "linear_token_logprobs": (linear_token_logprobs, "naive_from_hidden"),
    "naive_from_logits": (naive_from_logits, "naive_from_logits"),
    "policy_loss_from_logits": (policy_loss_from_logits, "naive_from_logits"),
    "token_logprobs": (token_logprobs, "naive_from_logits"),
}
