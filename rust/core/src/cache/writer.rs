//! The one thread that writes.
//!
//! Callers push rows into a bounded channel and wait for their receipts. The thread takes what is there,
//! commits it as one transaction, and hands out the receipts: many callers share one flush of the disk,
//! and a single one does not wait for others.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::commit::{Committer, PackedEntry};
use super::compression::Packer;
use super::failure::{WriteFailure, from_sqlite};
use super::fork;
use super::lock::WriterLock;
use super::training::{NUM_TRAINING_ROWS, Training};
use crate::error::{Error, Result};

/// Called once, on the thread that writes: whether the row is new, or why it is not on disk.
///
/// It must be quick and never panic. Dropped uncalled, it says that the writer is gone.
pub type Receipt = Box<dyn FnOnce(Result<bool>) + Send>;

/// Rows on their way: a caller that is further ahead waits.
const MAX_QUEUED_ROWS: usize = 1024;

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

struct Job {
    entry: PackedEntry,
    receipt: Receipt,
}

/// The callers' end.
pub(super) struct Writer {
    path: PathBuf,
    /// None after `close`.
    sender: RwLock<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Why the thread ended by itself.
    end: Arc<Mutex<Option<WriteFailure>>>,
}

impl Writer {
    /// Starts the thread, which owns `committer` and `lock` until the end.
    pub(super) fn start(
        path: &Path,
        committer: Committer,
        packer: Arc<Packer>,
        lock: WriterLock,
    ) -> Result<Self> {
        let num_rows =
            count_training_rows(&committer, &packer).map_err(|error| from_sqlite(path, &error))?;
        let (sender, receiver) = sync_channel(MAX_QUEUED_ROWS);
        let end = Arc::new(Mutex::new(None));
        let desk = Desk {
            path: path.to_owned(),
            committer,
            packer,
            num_rows,
            training: None,
            is_log_empty: false,
            last_group_rows: 0,
            end: Arc::clone(&end),
            _lock: lock,
        };
        let thread = std::thread::Builder::new()
            .name("gad-fast-cache".to_owned())
            .spawn(move || desk.run(&receiver))
            .map_err(|source| Error::CacheUnopenable {
                path: path.to_owned(),
                reason: format!("its writer cannot be started: {source}"),
            })?;
        Ok(Self {
            path: path.to_owned(),
            sender: RwLock::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            end,
        })
    }

    /// Queues a row; waits while the queue is full.
    pub(super) fn push(&self, entry: PackedEntry, receipt: Receipt) -> Result<()> {
        let sender = self.sender.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_ref() else {
            return Err(self.gone());
        };
        sender.send(Job { entry, receipt }).map_err(|_| self.gone())
    }

    /// The error for a row that got no receipt.
    pub(super) fn gone(&self) -> Error {
        match &*self.end.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => failure.to_error(),
            None => Error::CacheClosed {
                path: self.path.clone(),
            },
        }
    }

    /// Returns after everything that was queued is on disk and the lock is free.
    pub(super) fn close(&self) {
        self.sender
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of the thread is a bug; its callers got no receipt and know.
            drop(thread.join());
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

/// The thread's end.
struct Desk {
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
    fn run(mut self, jobs: &Receiver<Job>) {
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::cache::entry::{Request, Response};
    use crate::cache::schema::{open_for_reading, open_for_writing};

    fn entry(index: usize) -> PackedEntry {
        let messages = format!("[{{\"content\": {index}}}]");
        let response = Response {
            text: "x".repeat(4000),
            ..Response::default()
        };
        let request = Request::new("t", &messages, "{}", 0).unwrap();
        PackedEntry::new(&Packer::plain(), &request, &response)
    }

    /// A writer whose database may have `max_pages` pages, as on a disk that is nearly full.
    fn start(path: &Path, max_pages: u32) -> Writer {
        let lock = WriterLock::take(path).unwrap();
        let connection = open_for_writing(path).unwrap();
        let pages: u32 = connection
            .pragma_update_and_check(None, "max_page_count", max_pages, |row| row.get(0))
            .unwrap();
        assert_eq!(pages, max_pages);
        let committer = Committer::new(connection);
        Writer::start(path, committer, Arc::new(Packer::plain()), lock).unwrap()
    }

    fn put(writer: &Writer, index: usize) -> Result<bool> {
        let (sender, receiver) = sync_channel(1);
        let receipt = move |outcome| drop(sender.send(outcome));
        writer.push(entry(index), Box::new(receipt))?;
        receiver.recv().unwrap()
    }

    #[test]
    fn a_full_disk_loses_nothing_acknowledged_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let writer = start(&path, 24);
        let outcomes: Vec<_> = (0..60).map(|index| put(&writer, index)).collect();
        let num_stored = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert!(0 < num_stored && num_stored < 60, "{num_stored}");
        let message = outcomes[59].as_ref().unwrap_err().to_string();
        assert!(message.contains("full"), "{message}");
        assert!(message.contains("bytes are free there"), "{message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        writer.close();

        let count = |path: &Path| -> usize {
            open_for_reading(path)
                .unwrap()
                .query_row("SELECT COUNT(*) FROM responses", [], |row| row.get(0))
                .unwrap()
        };
        assert_eq!(count(&path), num_stored);
        // With room again, the same rows go in.
        let writer = start(&path, 10_000);
        for (index, outcome) in outcomes.iter().enumerate() {
            assert_eq!(put(&writer, index).unwrap(), outcome.is_err());
        }
        writer.close();
        assert_eq!(count(&path), 60);
    }

    #[test]
    fn every_row_of_a_failed_group_is_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let writer = start(&path, 10_000);
        put(&writer, 0).unwrap();
        let other = rusqlite::Connection::open(&path).unwrap();
        other.execute_batch("DROP TABLE responses").unwrap();
        assert!(put(&writer, 1).is_err());
        assert!(put(&writer, 2).is_err());
        writer.close();
        assert!(matches!(put(&writer, 3), Err(Error::CacheClosed { .. })));
    }
}
