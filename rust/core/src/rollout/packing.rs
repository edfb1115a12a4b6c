//! Which sequences share a row of at most so many tokens.

use std::cmp::Reverse;

use super::arguments::{at_least, lengths as checked, to_usize, token_budget};
use super::bins::Bins;
use super::open_bins::OpenBins;
use crate::error::Result;

/// What a bin may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackingLimits {
    /// Most tokens, at least 1.
    pub token_budget: i64,
    /// Most sequences, at least 1.
    pub max_sequences: Option<i64>,
    /// Each sequence takes up its length, rounded up to a multiple of this, which is at least 1.
    pub pad_to_multiple: i64,
}

impl PackingLimits {
    /// Bins that only their tokens limit.
    #[must_use]
    pub fn tokens(token_budget: i64) -> Self {
        Self {
            token_budget,
            max_sequences: None,
            pad_to_multiple: 1,
        }
    }
}

/// Packs sequences of these lengths by best-fit decreasing: from the longest to the shortest, each joins
/// the bin that it leaves the least room in, or opens one.
///
/// Every index comes exactly once, and the plan is the same on every machine: among equal lengths the
/// lower index is packed first, and among bins with equal room the one that changed last is filled.
/// Bins come in the order in which they were opened, their sequences longest first. A sequence over
/// the budget has a bin for itself: it costs memory, dropping it would change the loss.
///
/// Source: Johnson, Near-optimal bin packing algorithms, 1973 (at most 11/9 of the fewest bins).
pub fn pack_sequences(lengths: &[i64], limits: &PackingLimits) -> Result<Bins> {
    let multiple = at_least("pad_to_multiple", limits.pad_to_multiple, 1)?;
    let sizes: Vec<u64> = checked("lengths", lengths)?
        .iter()
        .map(|&length| length.cast_unsigned().next_multiple_of(multiple))
        .collect();
    let max_sequences = limits
        .max_sequences
        .map(|limit| at_least("max_sequences", limit, 1))
        .transpose()?;
    let budget = token_budget(limits.token_budget)?;
    Ok(pack_sizes(
        &sizes,
        budget,
        to_usize(max_sequences.unwrap_or(u64::MAX)),
    ))
}

/// Best-fit decreasing of sizes, which are at most 2^64 - 1 tokens.
pub(super) fn pack_sizes(sizes: &[u64], budget: u64, max_items: usize) -> Bins {
    // Sizes and indices side by side: to sort indices by the sizes they point to would miss the cache.
    let mut order: Vec<_> = sizes.iter().copied().map(Reverse).zip(0_usize..).collect();
    order.sort_unstable();
    let mut bins = Vec::with_capacity(sizes.len());
    let mut num_items: Vec<usize> = Vec::new();
    let mut open = OpenBins::new();
    for &(Reverse(size), _) in &order {
        let (bin, room) = open.pop_best(size).unwrap_or_else(|| {
            num_items.push(0);
            (num_items.len() - 1, budget)
        });
        bins.push(bin);
        num_items[bin] += 1;
        // A bin that is over its budget stays closed.
        if let Some(rest) = room.checked_sub(size)
            && num_items[bin] < max_items
        {
            open.push(bin, rest);
        }
    }
    let indices = order.iter().map(|&(_, index)| index);
    Bins::from_pairs(bins.iter().copied().zip(indices), &num_items)
}
