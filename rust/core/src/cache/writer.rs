//! Where rows are handed over to be written.
//!
//! Callers push rows into a bounded channel and wait for their receipts, which the one thread that writes
//! hands out.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::commit::{Committer, PackedEntry};
use super::compression::Packer;
use super::desk::Desk;
use super::failure::{WriteFailure, from_sqlite};
use super::lock::WriterLock;
use super::queue::Queue;
use crate::error::{Error, Result};

/// Called once, on the thread that writes: whether the row is new, or why it is not on disk.
///
/// It must be quick and never panic. Dropped uncalled, it says that the writer is gone.
pub type Receipt = Box<dyn FnOnce(Result<bool>) + Send>;

/// A row to be written.
pub(super) struct Job {
    pub(super) entry: PackedEntry,
    pub(super) receipt: Receipt,
}

/// The callers' end.
pub(super) struct Writer {
    path: PathBuf,
    queue: Queue<Job>,
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
        let end = Arc::new(Mutex::new(None));
        let desk = Desk::new(path, committer, packer, lock, Arc::clone(&end))
            .map_err(|error| from_sqlite(path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            queue: Queue::start("gad-fast-cache", path, move |jobs| desk.run(jobs))?,
            end,
        })
    }

    /// Queues a row; waits while the queue is full.
    pub(super) fn push(&self, entry: PackedEntry, receipt: Receipt) -> Result<()> {
        if self.queue.push(Job { entry, receipt }) {
            Ok(())
        } else {
            Err(self.gone())
        }
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
        self.queue.close();
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use std::sync::mpsc::sync_channel;

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
        PackedEntry::new(&Packer::plain(), request, response)
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
