//! Rows or groups of a batch, laid end to end for one forward pass.

use super::arguments::{index as checked_index, length_of, to_int32};
use super::batch::RolloutBatch;
use crate::error::Result;

/// Rows of a batch, laid end to end for one forward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedRows {
    /// Prompt and response of each row.
    pub tokens: Vec<i32>,
    /// Position of each token in its row.
    pub position_ids: Vec<i32>,
    /// Whether a token belongs to a response.
    pub response_mask: Vec<bool>,
    /// Where each row starts, and where the last one ends.
    pub cu_seqlens: Vec<i32>,
}

/// Where a row lies.
struct Row {
    index: usize,
    start: usize,
    prompt_length: usize,
    length: usize,
}

impl RolloutBatch {
    /// The rows of these indices, in this order; an index may come again.
    pub fn gather(&self, indices: &[i64]) -> Result<PackedRows> {
        let (rows, capacity) = self.rows(indices)?;
        let mut packed = PackedRows {
            tokens: Vec::with_capacity(capacity),
            position_ids: Vec::with_capacity(capacity),
            response_mask: Vec::with_capacity(capacity),
            cu_seqlens: vec![0],
        };
        for row in rows {
            let end = row.start + row.length;
            packed
                .tokens
                .extend_from_slice(&self.tokens()[row.start..end]);
            packed.position_ids.extend((0_i32..).take(row.length));
            let num_tokens = packed.response_mask.len();
            packed
                .response_mask
                .resize(num_tokens + row.prompt_length, false);
            packed.response_mask.resize(num_tokens + row.length, true);
            packed
                .cu_seqlens
                .push(to_int32((num_tokens + row.length) as u64)?);
        }
        Ok(packed)
    }

    /// A stream of these rows beside their tokens: 0 over prompts.
    pub fn gather_stream(&self, name: &str, indices: &[i64]) -> Result<Vec<f32>> {
        let stream = self.stream(name)?;
        let (rows, capacity) = self.rows(indices)?;
        let mut gathered = Vec::with_capacity(capacity);
        for row in rows {
            let start = to_index(self.response_offsets()[row.index]);
            let end = to_index(self.response_offsets()[row.index + 1]);
            gathered.resize(gathered.len() + row.prompt_length, 0.0);
            gathered.extend_from_slice(&stream[start..end]);
        }
        Ok(gathered)
    }

    /// One number a row of the batch, beside the tokens of the rows of these indices: 0 over prompts.
    pub fn spread(&self, values: &[f32], indices: &[i64]) -> Result<Vec<f32>> {
        length_of("values", values.len(), self.num_rows(), "rollout")?;
        let (rows, capacity) = self.rows(indices)?;
        let mut spread = Vec::with_capacity(capacity);
        for row in rows {
            let start = spread.len();
            spread.resize(start + row.prompt_length, 0.0);
            spread.resize(start + row.length, values[row.index]);
        }
        Ok(spread)
    }

    /// The tokens of these groups, each as `[prompt][rollouts ...][teacher]`, in this order: what
    /// [`GroupLengths::layout`](super::GroupLengths::layout) describes.
    pub fn gather_groups(&self, groups: &[i64]) -> Result<Vec<i32>> {
        let mut segments: Vec<&[i32]> = Vec::new();
        for (position, &group) in groups.iter().enumerate() {
            let group = checked_index("group_indices", position, group, self.num_groups())?;
            let first = group * self.group_size();
            let start = to_index(self.offsets()[first]);
            segments.push(&self.tokens()[start..start + to_index(self.prompt_lengths()[first])]);
            segments.extend((first..first + self.group_size()).map(|row| self.response(row)));
            let ends = [group, group + 1].map(|place| to_index(self.teacher_offsets()[place]));
            segments.push(&self.teacher_tokens()[ends[0]..ends[1]]);
        }
        to_int32(segments.iter().map(|segment| segment.len() as u64).sum())?;
        Ok(segments.concat())
    }

    fn response(&self, row: usize) -> &[i32] {
        let ends = [row, row + 1].map(|place| to_index(self.offsets()[place]));
        &self.tokens()[ends[0] + to_index(self.prompt_lengths()[row])..ends[1]]
    }

    /// Where the rows of these indices lie, and their tokens in all, which fit 32 bits.
    fn rows(&self, indices: &[i64]) -> Result<(Vec<Row>, usize)> {
        let mut rows = Vec::with_capacity(indices.len());
        let mut num_tokens = 0;
        for (position, &index) in indices.iter().enumerate() {
            let index = checked_index("indices", position, index, self.num_rows())?;
            let start = to_index(self.offsets()[index]);
            let length = to_index(self.offsets()[index + 1]) - start;
            num_tokens += length as u64;
            rows.push(Row {
                index,
                start,
                prompt_length: to_index(self.prompt_lengths()[index]),
                length,
            });
        }
        let capacity = to_int32(num_tokens)?.unsigned_abs() as usize;
        Ok((rows, capacity))
    }
}

/// Offsets and lengths of a sealed batch are counts of what lies in memory.
fn to_index(offset: i64) -> usize {
    usize::try_from(offset).unwrap_or_default()
}
