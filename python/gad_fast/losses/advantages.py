"""Group advantages: each rollout's reward against the other rollouts of its prompt."""

from typing import Literal

from torch import Tensor, where

EPSILON = 1e-6
"""Added to the standard deviation, as the official code does."""


def group_advantages(
    rewards: Tensor, *, scale: Literal["std", "none"] = "std", std_floor: float = 0.0
) -> Tensor:
    """Centred and, on demand, scaled rewards of each group.

    Scaling by `std` gives noise the full step size once the discriminator cannot tell the rollouts
    of a group apart; a floor, or no scaling, avoids that.

    Args:
        rewards: Float [B, G], G >= 2; a shift or a positive factor of a group's rewards changes
            nothing under `std` without a floor.
        scale: `std` divides by the group's sample standard deviation (G - 1), `none` does not.
        std_floor: least standard deviation to divide by, in units of the reward.

    Returns:
        Float [B, G]; exactly 0 in a group whose rewards are all equal.

    Source: paper appendix A.1, A_i = (r_i - mean r) / std r.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers may be off by one rounding; divided by epsilon that would be noise.
    is_flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = where(is_flat, 0.0, centred)
    if scale == "none":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True).clamp_min(std_floor) + EPSILON)
