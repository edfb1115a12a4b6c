//! The rollouts of one prompt, while they come in.

use super::arguments::{ids, length_of};
use super::finish_reason::FinishReason;
use crate::error::{Error, Result};

/// One response sampled from the student.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// What was answered, at least one id.
    pub prompt_ids: Vec<i32>,
    /// The answer, at least one id.
    pub response_ids: Vec<i32>,
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Number of student updates behind the weights that sampled it.
    pub weight_version: i64,
    /// One number a response token, by name: log-probabilities, for instance.
    pub streams: Vec<(String, Vec<f32>)>,
}

impl Rollout {
    /// Brings the streams into the order of `names`, and checks that everything fits.
    pub(super) fn check(&mut self, names: &[String]) -> Result<()> {
        for (name, values) in [
            ("prompt_ids", &self.prompt_ids),
            ("response_ids", &self.response_ids),
        ] {
            if values.is_empty() {
                return Err(Error::IdsEmpty { name });
            }
            ids(name, values)?;
        }
        self.sort_streams(names)?;
        let num_tokens = self.response_ids.len();
        self.streams
            .iter()
            .try_for_each(|(name, values)| length_of(name, values.len(), num_tokens, "response id"))
    }

    fn sort_streams(&mut self, names: &[String]) -> Result<()> {
        if let Some((unknown, _)) = self.streams.iter().find(|(name, _)| !names.contains(name)) {
            return Err(Error::StreamUnknown {
                name: unknown.clone(),
                known: names.to_vec(),
            });
        }
        for (place, name) in names.iter().enumerate() {
            let found = self.streams.iter().skip(place).position(|(n, _)| n == name);
            let Some(distance) = found else {
                return Err(Error::StreamMissing { name: name.clone() });
            };
            self.streams.swap(place, place + distance);
        }
        match self.streams.get(names.len()) {
            Some((name, _)) => Err(Error::StreamRepeated { name: name.clone() }),
            None => Ok(()),
        }
    }
}

/// The rollouts of one prompt, while they come in, and the teacher's response.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) prompt_ids: Vec<i32>,
    /// In the order in which they came; their prompt is kept once, above.
    pub(super) rollouts: Vec<Rollout>,
    pub(super) teacher_ids: Option<Vec<i32>>,
}

impl Group {
    /// Adds a checked rollout.
    pub(super) fn push(&mut self, id: i64, mut rollout: Rollout, group_size: usize) -> Result<()> {
        if self.rollouts.len() == group_size {
            return Err(Error::GroupFull {
                group_id: id,
                group_size,
            });
        }
        let prompt_ids = std::mem::take(&mut rollout.prompt_ids);
        if self.rollouts.is_empty() {
            self.prompt_ids = prompt_ids;
        } else if self.prompt_ids != prompt_ids {
            return Err(Error::PromptDiffers { group_id: id });
        }
        self.rollouts.push(rollout);
        Ok(())
    }

    /// Whether the weights of some rollout are too old: the one place that decides it.
    ///
    /// A group is as old as its oldest rollout, because its advantages compare all of them.
    pub(super) fn is_stale(&self, current_version: i64, max_staleness: Option<u64>) -> bool {
        let oldest = self.rollouts.iter().map(|r| r.weight_version).min();
        match (oldest, max_staleness) {
            (Some(oldest), Some(max_staleness)) => {
                i128::from(current_version) - i128::from(oldest) > max_staleness.into()
            }
            _ => false,
        }
    }
}
