//! The packed form of a batch of id sequences.

/// Sequences of token ids, laid end to end.
///
/// Sequence `i` is `ids[offsets[i]..offsets[i + 1]]`; so `offsets` starts at 0, ends at the number of
/// ids, and is one longer than the number of sequences.
///
/// The types are those of the arrays the trainer holds: an id fits 32 bits, a position may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// The ids of all sequences.
    pub ids: Vec<i32>,
    /// Where each sequence starts, and where the last one ends.
    pub offsets: Vec<i64>,
}

impl TokenBatch {
    /// A batch without sequences, with room for `num_sequences` of `num_ids` ids in total.
    pub(crate) fn with_capacity(num_sequences: usize, num_ids: usize) -> Self {
        let mut offsets = Vec::with_capacity(num_sequences + 1);
        offsets.push(0);
        Self {
            ids: Vec::with_capacity(num_ids),
            offsets,
        }
    }

    /// Ends the sequence whose ids were appended to `ids`.
    pub(crate) fn end_sequence(&mut self) {
        self.offsets.push(self.num_ids());
    }

    /// Appends the sequences of `other`.
    pub(crate) fn append(&mut self, other: &Self) {
        let shift = self.num_ids();
        self.ids.extend_from_slice(&other.ids);
        self.offsets
            .extend(other.offsets[1..].iter().map(|offset| offset + shift));
    }

    #[expect(
        clippy::cast_possible_wrap,
        reason = "a Vec holds at most isize::MAX bytes"
    )]
    fn num_ids(&self) -> i64 {
        self.ids.len() as i64
    }
}
