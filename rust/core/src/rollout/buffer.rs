//! Where rollouts wait until the groups of a step are complete.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::arguments::{at_least, ids, to_usize};
use super::batch::RolloutBatch;
use super::group::{Group, Rollout};
use crate::error::{Error, Result};
use crate::tokenize::TextCodec;

/// What a wait for groups gave.
#[derive(Debug)]
pub enum Taken {
    /// The groups that were asked for.
    Batch(RolloutBatch),
    /// Too few were ready in time; they stay.
    TimedOut,
    /// Too few are ready, and no more will come.
    Closed,
}

/// Collects rollouts from many threads, and gives them out in whole groups.
///
/// A group is ready when its last rollout is in, and ready groups leave in that order. Its number is
/// free again once it has left. The lock is held to move a few vectors, never to copy tokens.
pub struct RolloutBuffer {
    group_size: usize,
    stream_names: Arc<[String]>,
    max_staleness: Option<u64>,
    state: Mutex<State>,
    has_changed: Condvar,
}

#[derive(Default)]
struct State {
    groups: HashMap<i64, Group>,
    /// Numbers of the complete ones, in the order in which they became so.
    ready: VecDeque<i64>,
    num_rollouts: usize,
    num_dropped: u64,
    is_closed: bool,
}

impl RolloutBuffer {
    /// A buffer for groups of `group_size` rollouts which carry the streams of these names.
    ///
    /// A group of which a rollout is more than `max_staleness` student updates old is dropped.
    pub fn new(
        group_size: i64,
        stream_names: Vec<String>,
        max_staleness: Option<i64>,
    ) -> Result<Self> {
        for (place, name) in stream_names.iter().enumerate() {
            if stream_names[..place].contains(name) {
                return Err(Error::StreamRepeated { name: name.clone() });
            }
        }
        Ok(Self {
            group_size: to_usize(at_least("group_size", group_size, 1)?),
            stream_names: stream_names.into(),
            max_staleness: max_staleness
                .map(|limit| at_least("max_staleness", limit, 0))
                .transpose()?,
            state: Mutex::default(),
            has_changed: Condvar::new(),
        })
    }

    /// Adds a rollout to the group of this number.
    pub fn push(&self, group_id: i64, mut rollout: Rollout) -> Result<()> {
        rollout.check(&self.stream_names)?;
        let mut state = self.open_state()?;
        let group = state.groups.entry(group_id).or_default();
        group.push(group_id, rollout, self.group_size)?;
        let is_ready = group.rollouts.len() == self.group_size;
        state.num_rollouts += 1;
        if is_ready {
            state.ready.push_back(group_id);
            self.has_changed.notify_all();
        }
        Ok(())
    }

    /// Stores the teacher's response to a group's prompt, which may come before any rollout.
    pub fn push_teacher(&self, group_id: i64, teacher_ids: Vec<i32>) -> Result<()> {
        if teacher_ids.is_empty() {
            return Err(Error::IdsEmpty {
                name: "teacher_ids",
            });
        }
        ids("teacher_ids", &teacher_ids)?;
        let mut state = self.open_state()?;
        let group = state.groups.entry(group_id).or_default();
        if group.teacher_ids.is_some() {
            return Err(Error::TeacherRepeated { group_id });
        }
        group.teacher_ids = Some(teacher_ids);
        Ok(())
    }

    /// Encodes the teacher's response to a group's prompt and stores it as [`push_teacher`] does.
    ///
    /// It is cut as a rollout is: after the first end token, one being appended, and at `max_tokens`. A
    /// discriminator that reads the last token could otherwise tell the two apart by their ending.
    ///
    /// [`push_teacher`]: Self::push_teacher
    pub fn encode_teacher(
        &self,
        group_id: i64,
        codec: &TextCodec,
        text: &str,
        end_id: i32,
        max_tokens: i64,
    ) -> Result<()> {
        at_least("end_id", end_id.into(), 0)?;
        let max_tokens = to_usize(at_least("max_tokens", max_tokens, 1)?);
        let encoded = codec.encode_batch(&[text])?;
        let (response, _) = encoded.into_responses(end_id, max_tokens);
        self.push_teacher(group_id, response.ids)
    }

    /// Waits at most `timeout` for `num_groups` ready groups that are fresh at `current_version`, and
    /// takes them out.
    pub fn take(&self, num_groups: i64, current_version: i64, timeout: Duration) -> Result<Taken> {
        let num_groups = to_usize(at_least("num_groups", num_groups, 1)?);
        // A time beyond what the clock can hold is no limit.
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            self.drop_stale(&mut state, current_version);
            if state.ready.len() >= num_groups {
                let groups = state.pop_ready(num_groups);
                drop(state);
                return Ok(Taken::Batch(RolloutBatch::seal(
                    groups,
                    self.group_size,
                    Arc::clone(&self.stream_names),
                )));
            }
            if state.is_closed {
                return Ok(Taken::Closed);
            }
            let rest =
                deadline.map_or(timeout, |end| end.saturating_duration_since(Instant::now()));
            if rest.is_zero() {
                return Ok(Taken::TimedOut);
            }
            state = self
                .has_changed
                .wait_timeout(state, rest)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Refuses rollouts from now on, and ends every wait; ready groups can still be taken.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.has_changed.notify_all();
    }

    /// Whether `close` was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// Number of groups that are complete and not taken.
    #[must_use]
    pub fn num_ready(&self) -> usize {
        self.lock().ready.len()
    }

    /// Number of rollouts in the buffer, those of incomplete groups included.
    #[must_use]
    pub fn num_rollouts(&self) -> usize {
        self.lock().num_rollouts
    }

    /// Number of groups dropped so far because they were stale.
    #[must_use]
    pub fn num_dropped(&self) -> u64 {
        self.lock().num_dropped
    }

    /// Drops ready groups only: rollouts still to come for a group dropped before it is complete
    /// would start a new one that never becomes so.
    fn drop_stale(&self, state: &mut State, current_version: i64) {
        if self.max_staleness.is_none() {
            return;
        }
        let State { groups, ready, .. } = state;
        let num_before = ready.len();
        ready.retain(|id| {
            let group = groups.get(id);
            let is_stale = group.is_none_or(|g| g.is_stale(current_version, self.max_staleness));
            if is_stale {
                groups.remove(id);
            }
            !is_stale
        });
        let num_dropped = num_before - ready.len();
        state.num_dropped += num_dropped as u64;
        state.num_rollouts -= num_dropped * self.group_size;
    }

    fn open_state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.is_closed {
            return Err(Error::BufferClosed);
        }
        Ok(state)
    }

    /// A panic of a holder cannot leave the state half changed, so poison is no reason to stop.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pop_ready(&mut self, num_groups: usize) -> Vec<(i64, Group)> {
        let groups: Vec<_> = self
            .ready
            .drain(..num_groups)
            .filter_map(|id| Some((id, self.groups.remove(&id)?)))
            .collect();
        self.num_rollouts -= groups.iter().map(|(_, g)| g.rollouts.len()).sum::<usize>();
        groups
    }
}
