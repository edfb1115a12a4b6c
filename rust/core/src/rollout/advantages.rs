//! Group advantages: each rollout's reward against the other rollouts of its prompt.

use super::arguments::at_least_zero;
use crate::error::Result;

/// What to compute of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdvantageOptions {
    /// Whether to divide by the sample standard deviation of the group; Dr. GRPO does not.
    pub is_scaled: bool,
    /// Whether to subtract the mean of the others in place of that of all, as RLOO does.
    pub leave_one_out: bool,
    /// Least standard deviation to divide by, in units of the reward.
    pub std_floor: f64,
    /// Added to the standard deviation, in units of the reward.
    pub eps: f64,
}

/// The advantages of `rewards`, of which each `group_size` in a row are a group.
///
/// For the n rewards of one group, with mean m and sample standard deviation s,
/// `(r - m) / (max(s, std_floor) + eps)`, without the division if not scaled, and `r - m` times
/// n / (n - 1) if a rollout is left out of its own mean.
///
/// Computed in 64 bits of the differences to the group's first reward: that changes no value, and makes
/// the advantages of equal rewards, and of a group of one, exactly 0. The mean of equal numbers may be
/// off by a rounding, which divided by `eps` would be noise of full size.
pub fn group_advantages(
    rewards: &[f32],
    group_size: usize,
    options: &AdvantageOptions,
) -> Result<Vec<f32>> {
    at_least_zero("std_floor", options.std_floor)?;
    at_least_zero("eps", options.eps)?;
    let mut advantages = Vec::with_capacity(rewards.len());
    for group in rewards.chunks(group_size.max(1)) {
        push_group(group, options, &mut advantages);
    }
    Ok(advantages)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a group is far smaller than 2^52"
)]
fn push_group(rewards: &[f32], options: &AdvantageOptions, advantages: &mut Vec<f32>) {
    let first = f64::from(rewards[0]);
    let count = rewards.len() as f64;
    let degrees = (count - 1.0).max(1.0);
    let differences = || rewards.iter().map(|&reward| f64::from(reward) - first);
    let mean = differences().sum::<f64>() / count;

    let left_out = if options.leave_one_out {
        count / degrees
    } else {
        1.0
    };
    let mut divisor = 1.0;
    if options.is_scaled {
        let variance = differences().map(|d| (d - mean).powi(2)).sum::<f64>() / degrees;
        divisor = variance.sqrt().max(options.std_floor) + options.eps;
    }
    // 0 / 0, where neither a floor nor eps keeps the divisor of equal rewards above 0.
    let advantage = |centred: f64| {
        if centred == 0.0 {
            0.0
        } else {
            centred * left_out / divisor
        }
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rewards have 32 bits, and so have their advantages"
    )]
    advantages.extend(differences().map(|d| advantage(d - mean) as f32));
}
