//! Lists of indices, laid end to end.

use super::arguments::{check_offsets, lengths, to_int64};
use crate::error::Result;

/// Which items lie together: bin `b` holds `indices[offsets[b]..offsets[b + 1]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bins {
    /// The items of all bins.
    pub indices: Vec<i64>,
    /// Where each bin starts, and where the last one ends.
    pub offsets: Vec<i64>,
}

impl Bins {
    /// The lists that `offsets` cut `indices` into; indices are at least 0.
    pub fn new(indices: Vec<i64>, offsets: Vec<i64>) -> Result<Self> {
        check_offsets("offsets", &offsets, indices.len(), "indices")?;
        lengths("indices", &indices)?;
        Ok(Self { indices, offsets })
    }

    /// Collects pairs of a bin and an item in it, of which there are so many in each bin.
    pub(super) fn from_pairs(
        pairs: impl Iterator<Item = (usize, usize)>,
        num_items: &[usize],
    ) -> Self {
        let mut places = Vec::with_capacity(num_items.len());
        let mut offsets = Vec::with_capacity(num_items.len() + 1);
        let mut end = 0;
        offsets.push(0);
        for count in num_items {
            places.push(end);
            end += count;
            offsets.push(to_int64(end));
        }
        let mut indices = vec![0; end];
        for (bin, item) in pairs {
            indices[places[bin]] = to_int64(item);
            places[bin] += 1;
        }
        Self { indices, offsets }
    }

    /// The items of each bin.
    pub fn iter(&self) -> impl Iterator<Item = &[i64]> {
        self.offsets.windows(2).filter_map(|range| {
            let start = usize::try_from(range[0]).ok()?;
            let end = usize::try_from(range[1]).ok()?;
            self.indices.get(start..end)
        })
    }

    /// Number of bins.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no bin.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
