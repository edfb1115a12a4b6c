//! The rollouts of a step, sealed.

use std::sync::Arc;

use super::advantages::{AdvantageOptions, group_advantages};
use super::arguments::{finite, length_of, to_int64};
use super::group::{Group, Rollout};
use crate::error::{Error, Result};

/// The rollouts of whole groups as a struct of arrays, immutable and cheap to clone.
///
/// A row is one rollout, and the rows of a group follow each other. What is computed of a batch makes a
/// new one that shares the arrays; so a view of them may outlive everything else.
#[derive(Clone, Debug)]
pub struct RolloutBatch {
    columns: Arc<Columns>,
    scores: Option<Arc<Vec<f32>>>,
    rewards: Option<Arc<Vec<f32>>>,
}

/// Ragged columns have offsets, from 0 to their length.
#[derive(Debug)]
struct Columns {
    group_size: usize,
    stream_names: Arc<[String]>,
    tokens: Vec<i32>,
    offsets: Vec<i64>,
    prompt_lengths: Vec<i64>,
    response_offsets: Vec<i64>,
    group_ids: Vec<i64>,
    finish_reasons: Vec<u8>,
    weight_versions: Vec<i64>,
    streams: Vec<Vec<f32>>,
    teacher_tokens: Vec<i32>,
    teacher_offsets: Vec<i64>,
}

impl RolloutBatch {
    /// Lays the rows of `groups` end to end.
    pub(super) fn seal(
        groups: Vec<(i64, Group)>,
        group_size: usize,
        stream_names: Arc<[String]>,
    ) -> Self {
        let mut columns = Columns::with_room_for(&groups, group_size, stream_names);
        // Each group is freed once it is copied, so that the peak is not two batches.
        for (id, group) in groups {
            columns.push(id, &group);
        }
        Self {
            columns: Arc::new(columns),
            scores: None,
            rewards: None,
        }
    }

    /// The same rows with the discriminator's scores, and the rewards that the student's loss sees.
    pub fn with_scores(&self, scores: Vec<f32>, rewards: Option<Vec<f32>>) -> Result<Self> {
        self.check_column("scores", &scores)?;
        if let Some(rewards) = &rewards {
            self.check_column("rewards", rewards)?;
        }
        let scores = Arc::new(scores);
        Ok(Self {
            columns: Arc::clone(&self.columns),
            rewards: Some(rewards.map_or_else(|| Arc::clone(&scores), Arc::new)),
            scores: Some(scores),
        })
    }

    /// The advantage of each row, its reward against those of its group.
    pub fn advantages(&self, options: &AdvantageOptions) -> Result<Vec<f32>> {
        let rewards = self.rewards().ok_or(Error::RewardsMissing)?;
        group_advantages(rewards, self.columns.group_size, options)
    }

    /// Number of rollouts.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.columns.group_ids.len()
    }

    /// Number of groups.
    #[must_use]
    pub fn num_groups(&self) -> usize {
        self.columns.teacher_offsets.len() - 1
    }

    /// Rollouts a group.
    #[must_use]
    pub fn group_size(&self) -> usize {
        self.columns.group_size
    }

    /// Prompt and response of every row.
    #[must_use]
    pub fn tokens(&self) -> &[i32] {
        &self.columns.tokens
    }

    /// Where each row starts in `tokens`, and where the last one ends.
    #[must_use]
    pub fn offsets(&self) -> &[i64] {
        &self.columns.offsets
    }

    /// Tokens of each row's prompt.
    #[must_use]
    pub fn prompt_lengths(&self) -> &[i64] {
        &self.columns.prompt_lengths
    }

    /// Where each row starts in a stream, and where the last one ends.
    #[must_use]
    pub fn response_offsets(&self) -> &[i64] {
        &self.columns.response_offsets
    }

    /// Number of each row's group, as the caller gave it.
    #[must_use]
    pub fn group_ids(&self) -> &[i64] {
        &self.columns.group_ids
    }

    /// Code of each row's [`FinishReason`](super::FinishReason).
    #[must_use]
    pub fn finish_reasons(&self) -> &[u8] {
        &self.columns.finish_reasons
    }

    /// Version of the weights that sampled each row.
    #[must_use]
    pub fn weight_versions(&self) -> &[i64] {
        &self.columns.weight_versions
    }

    /// Names of the streams.
    #[must_use]
    pub fn stream_names(&self) -> &[String] {
        &self.columns.stream_names
    }

    /// The stream of this name, one number a response token.
    pub fn stream(&self, name: &str) -> Result<&[f32]> {
        let place = self.stream_names().iter().position(|known| known == name);
        place
            .and_then(|place| self.columns.streams.get(place))
            .map(Vec::as_slice)
            .ok_or_else(|| Error::StreamUnknown {
                name: name.to_owned(),
                known: self.stream_names().to_vec(),
            })
    }

    /// The teacher's response of each group; empty where none was pushed.
    #[must_use]
    pub fn teacher_tokens(&self) -> &[i32] {
        &self.columns.teacher_tokens
    }

    /// Where each group's teacher response starts, and where the last one ends.
    #[must_use]
    pub fn teacher_offsets(&self) -> &[i64] {
        &self.columns.teacher_offsets
    }

    /// The discriminator's raw scalar of each row, once it is known.
    #[must_use]
    pub fn scores(&self) -> Option<&[f32]> {
        self.scores.as_ref().map(|scores| scores.as_slice())
    }

    /// The score of each row as the student's loss sees it, once it is known.
    #[must_use]
    pub fn rewards(&self) -> Option<&[f32]> {
        self.rewards.as_ref().map(|rewards| rewards.as_slice())
    }

    fn check_column(&self, name: &'static str, values: &[f32]) -> Result<()> {
        length_of(name, values.len(), self.num_rows(), "rollout")?;
        finite(name, values)
    }
}

impl Columns {
    fn with_room_for(
        groups: &[(i64, Group)],
        group_size: usize,
        stream_names: Arc<[String]>,
    ) -> Self {
        let num_rows = groups.iter().map(|(_, g)| g.rollouts.len()).sum::<usize>();
        let num_prompts = |g: &Group| g.prompt_ids.len() * g.rollouts.len();
        let num_prompt_ids: usize = groups.iter().map(|(_, g)| num_prompts(g)).sum();
        let rollouts = groups.iter().flat_map(|(_, g)| &g.rollouts);
        let num_response_ids: usize = rollouts.map(|r| r.response_ids.len()).sum();
        let starts = |count: usize| {
            let mut offsets = Vec::with_capacity(count + 1);
            offsets.push(0);
            offsets
        };
        Self {
            group_size,
            tokens: Vec::with_capacity(num_prompt_ids + num_response_ids),
            offsets: starts(num_rows),
            prompt_lengths: Vec::with_capacity(num_rows),
            response_offsets: starts(num_rows),
            group_ids: Vec::with_capacity(num_rows),
            finish_reasons: Vec::with_capacity(num_rows),
            weight_versions: Vec::with_capacity(num_rows),
            streams: stream_names
                .iter()
                .map(|_| Vec::with_capacity(num_response_ids))
                .collect(),
            stream_names,
            teacher_tokens: Vec::new(),
            teacher_offsets: starts(groups.len()),
        }
    }

    fn push(&mut self, id: i64, group: &Group) {
        for rollout in &group.rollouts {
            self.push_row(id, &group.prompt_ids, rollout);
        }
        self.teacher_tokens
            .extend_from_slice(group.teacher_ids.as_deref().unwrap_or_default());
        self.teacher_offsets
            .push(to_int64(self.teacher_tokens.len()));
    }

    fn push_row(&mut self, id: i64, prompt_ids: &[i32], rollout: &Rollout) {
        self.tokens.extend_from_slice(prompt_ids);
        self.tokens.extend_from_slice(&rollout.response_ids);
        self.offsets.push(to_int64(self.tokens.len()));
        self.prompt_lengths.push(to_int64(prompt_ids.len()));
        let start = self.response_offsets.last().copied().unwrap_or_default();
        self.response_offsets
            .push(start + to_int64(rollout.response_ids.len()));
        self.group_ids.push(id);
        self.finish_reasons.push(rollout.finish_reason.code());
        self.weight_versions.push(rollout.weight_version);
        for (column, (_, values)) in self.streams.iter_mut().zip(&rollout.streams) {
            column.extend_from_slice(values);
        }
    }
}
