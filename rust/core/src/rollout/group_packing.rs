//! Groups laid out as `[prompt][rollouts ...][teacher]`, so that a prompt is read once.

use super::arguments::{
    check_offsets, index as checked_index, length_of, lengths, to_int32,
    token_budget as checked_budget,
};
use super::bins::Bins;
use super::packing::pack_sizes;
use crate::error::{Error, Result};

/// The lengths of groups of any sizes.
///
/// The rollouts of group `g` are `response_lengths[group_offsets[g]..group_offsets[g + 1]]`.
#[derive(Clone, Copy, Debug)]
pub struct GroupLengths<'a> {
    prompts: &'a [i64],
    responses: &'a [i64],
    offsets: &'a [i64],
    teachers: &'a [i64],
}

/// What attention has to know of the tokens of some groups, laid end to end.
///
/// A token sees those before it of its own segment, and the prompt of its group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupLayout {
    /// Position of each token in its sequence: a response goes on where the prompt ended.
    pub position_ids: Vec<i32>,
    /// Place of each token's segment in its group: 0 for the prompt, then the rollouts, then the teacher.
    pub segment_ids: Vec<i32>,
    /// Where each group starts, and where the last one ends.
    pub cu_seqlens: Vec<i32>,
}

impl<'a> GroupLengths<'a> {
    /// Checks that the columns fit each other; one prompt and one teacher response a group, of which 0
    /// tokens stand for none.
    pub fn new(
        prompts: &'a [i64],
        responses: &'a [i64],
        offsets: &'a [i64],
        teachers: &'a [i64],
    ) -> Result<Self> {
        length_of("teacher_lengths", teachers.len(), prompts.len(), "group")?;
        if offsets.len() != prompts.len() + 1 {
            return Err(Error::GroupOffsetsCount {
                length: offsets.len(),
                num_groups: prompts.len(),
            });
        }
        check_offsets("group_offsets", offsets, responses.len(), "rollouts")?;
        Ok(Self {
            prompts: lengths("prompt_lengths", prompts)?,
            responses: lengths("response_lengths", responses)?,
            offsets,
            teachers: lengths("teacher_lengths", teachers)?,
        })
    }

    /// Packs whole groups by best-fit decreasing, each with all its tokens, the teacher's included.
    ///
    /// A group over the budget has a bin for itself; no group is torn.
    pub fn pack(&self, token_budget: i64) -> Result<Bins> {
        let budget = checked_budget(token_budget)?;
        let sizes: Vec<u64> = (0..self.prompts.len())
            .map(|g| self.num_tokens(g))
            .collect();
        Ok(pack_sizes(&sizes, budget, usize::MAX))
    }

    /// The layout of the groups of one bin, in this order.
    pub fn layout(&self, groups: &[i64]) -> Result<GroupLayout> {
        let groups = self.checked(groups)?;
        let sizes = groups.iter().map(|&group| self.num_tokens(group));
        let num_tokens = sizes.fold(0, u64::saturating_add);
        // Also the bound of every number in the layout.
        let capacity = to_int32(num_tokens)?.unsigned_abs() as usize;
        let mut layout = GroupLayout {
            position_ids: Vec::with_capacity(capacity),
            segment_ids: Vec::with_capacity(capacity),
            cu_seqlens: vec![0],
        };
        for group in groups {
            let prompt_length = self.prompts[group];
            layout.push_segment(0, 0, prompt_length);
            let others = self
                .responses_of(group)
                .iter()
                .chain([&self.teachers[group]]);
            for (segment, &length) in (1..).zip(others) {
                layout.push_segment(segment, prompt_length, length);
            }
            layout.end_group()?;
        }
        Ok(layout)
    }

    fn checked(&self, groups: &[i64]) -> Result<Vec<usize>> {
        let checked = |(position, &group)| {
            checked_index("group_indices", position, group, self.prompts.len())
        };
        groups.iter().enumerate().map(checked).collect()
    }

    fn responses_of(&self, group: usize) -> &'a [i64] {
        let bound = |place: usize| usize::try_from(self.offsets[place]).unwrap_or_default();
        &self.responses[bound(group)..bound(group + 1)]
    }

    /// Tokens of a group; what no machine could hold saturates, and is over every budget.
    fn num_tokens(&self, group: usize) -> u64 {
        [self.prompts[group], self.teachers[group]]
            .iter()
            .chain(self.responses_of(group))
            .fold(0, |sum: u64, &length| {
                sum.saturating_add(length.cast_unsigned())
            })
    }
}

impl GroupLayout {
    /// Adds `length` tokens from position `start` on, which all fit 32 bits.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the total of the layout fits 32 bits"
    )]
    fn push_segment(&mut self, segment: i32, start: i64, length: i64) {
        self.position_ids
            .extend((start as i32)..(start + length) as i32);
        self.segment_ids.resize(self.position_ids.len(), segment);
    }

    fn end_group(&mut self) -> Result<()> {
        self.cu_seqlens
            .push(to_int32(self.position_ids.len() as u64)?);
        Ok(())
    }
}
