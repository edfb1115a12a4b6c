//! The one thread that writes.
//!
//! It takes the rows that are there, commits them as one transaction, and hands out the receipts: many
//! callers share one flush of the disk, and a single one does not wait for others.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::commit::Committer;
use super::compression::Packer;
use super::failure::WriteFailure;
use super::fork;
use super::lock::WriterLock;
use super::training::{NUM_TRAINING_ROWS, Training};
use super::writer::{Job, Receipt};

const MAX_GROUP_ROWS: usize = 256;

/// A group that gets new rows all the time is committed after this.
const MAX_GROUP_DURATION: Duration = Duration::from_millis(20);

/// How long a group waits, once, for more rows while many callers put at once.
///
/// A group of few rows writes nearly as many pages of the indices as one of many. The wait is a sleep: to
/// be woken by every row would take more time than it saves. A single caller is not kept waiting.
const GATHERING: Duration = Duration::from_micros(300);

/// With nothing to write for this long, the log is copied into the database.
const IDLE: Duration = Duration::from_secs(1);

/// What the thread that writes holds.
pub(super) struct Desk {
    path: PathBuf,
    committer: Committer,
    packer: Arc<Packer>,
    /// Rows stored so far, as far as that matters to the training.
    num_rows: usize,
    training: Option<Training>,
    is_log_empty: bool,
    last_group_rows: usize,
    end: Arc<Mutex<Option<WriteFailure>>>,
    _lock: WriterLock,
}

impl Desk {
    pub(super) fn new(
        path: &Path,
        committer: Committer,
        packer: Arc<Packer>,
        lock: WriterLock,
        end: Arc<Mutex<Option<WriteFailure>>>,
    ) -> rusqlite::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            num_rows: count_training_rows(&committer, &packer)?,
            committer,
            packer,
            training: None,
            is_log_empty: false,
            last_group_rows: 0,
            end,
            _lock: lock,
        })
    }

    /// Writes until the senders of `jobs` are gone, or no commit can be trusted any more.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            match jobs.recv_timeout(IDLE) {
                Ok(first) => {
                    if let Err(failure) = self.write_group(first, jobs) {
                        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.rest(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.training.as_ref().is_some_and(Training::is_done) {
                self.store_dictionary();
            }
        }
        self.store_dictionary();
        self.rest();
        let _inside = fork::enter();
        drop(self);
    }

    /// Commits `first` and what else is queued. Fails only if no later commit can be trusted.
    fn write_group(
        &mut self,
        first: Job,
        jobs: &Receiver<Job>,
    ) -> std::result::Result<(), WriteFailure> {
        let mut receipts = Vec::with_capacity(MAX_GROUP_ROWS);
        let inside = fork::enter();
        let outcome = self.commit_group(first, jobs, &mut receipts);
        drop(inside);
        match outcome {
            Ok(()) => {
                self.is_log_empty = false;
                self.num_rows += receipts.iter().filter(|(_, is_new)| *is_new).count();
                for (receipt, is_new) in receipts {
                    receipt(Ok(is_new));
                }
                self.consider_training();
                Ok(())
            }
            Err(error) => {
                self.committer.roll_back();
                let failure = WriteFailure::new(&self.path, &error);
                for (receipt, _) in receipts {
                    receipt(Err(failure.to_error()));
                }
                if failure.is_final {
                    Err(failure)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// One transaction; `receipts` gets every row that was taken, whatever comes of it.
    fn commit_group(
        &mut self,
        first: Job,
        jobs: &Receiver<Job>,
        receipts: &mut Vec<(Receipt, bool)>,
    ) -> rusqlite::Result<()> {
        let start = Instant::now();
        let mut next = Some(first);
        let (mut has_begun, mut has_waited) = (false, false);
        while let Some(Job { entry, receipt }) = next {
            receipts.push((receipt, false));
            if !has_begun {
                self.committer.begin()?;
                has_begun = true;
            }
            let is_new = self.committer.insert(&entry)?;
            if let Some(last) = receipts.last_mut() {
                last.1 = is_new;
            }
            let is_full = receipts.len() == MAX_GROUP_ROWS || start.elapsed() >= MAX_GROUP_DURATION;
            next = if is_full {
                None
            } else {
                self.next_of_group(jobs, &mut has_waited)
            };
        }
        self.last_group_rows = receipts.len();
        self.committer.commit()
    }

    /// A row that is there, or comes soon while the last group says that callers are many.
    fn next_of_group(&self, jobs: &Receiver<Job>, has_waited: &mut bool) -> Option<Job> {
        let next = jobs.try_recv().ok();
        if next.is_some() || *has_waited || self.last_group_rows < 2 {
            return next;
        }
        *has_waited = true;
        std::thread::sleep(GATHERING);
        jobs.try_recv().ok()
    }

    /// Housekeeping while nothing is asked.
    fn rest(&mut self) {
        if !self.is_log_empty {
            let _inside = fork::enter();
            // A reader may be in the way; the log then stays, which is safe, until the next time.
            self.is_log_empty = self.committer.checkpoint().is_ok();
        }
    }

    fn consider_training(&mut self) {
        let is_time = self.num_rows >= NUM_TRAINING_ROWS && self.packer.wants_dictionary();
        if is_time && self.training.is_none() {
            self.training = Training::start(self.path.clone());
            // Whatever comes of it, once is enough.
            self.num_rows = 0;
        }
    }

    /// Stores what a training gave, and only then lets callers use it.
    fn store_dictionary(&mut self) {
        let Some(dictionary) = self.training.take().and_then(Training::finish) else {
            return;
        };
        let _inside = fork::enter();
        let stored = self.committer.begin().and_then(|()| {
            let id = self.committer.insert_dictionary(&dictionary)?;
            self.committer.commit()?;
            Ok(id)
        });
        match stored {
            Ok(id) => self.packer.use_dictionary(id, dictionary),
            // Texts take more space, no more.
            Err(_) => self.committer.roll_back(),
        }
    }
}

/// Rows that count towards the training of a dictionary; past it, or without need of one, any number.
fn count_training_rows(committer: &Committer, packer: &Packer) -> rusqlite::Result<usize> {
    if !packer.wants_dictionary() {
        return Ok(0);
    }
    committer.connection().query_row(
        "SELECT COUNT(*) FROM (SELECT 1 FROM responses LIMIT ?1)",
        [NUM_TRAINING_ROWS],
        |row| row.get(0),
    )
}
