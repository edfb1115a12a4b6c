//! A bounded queue of jobs with one thread at its end.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use crate::error::{Error, Result};

/// Jobs on their way: a caller that is further ahead waits.
const MAX_QUEUED_JOBS: usize = 1024;

/// The callers' end.
pub(super) struct Queue<J> {
    /// None after `close`.
    sender: RwLock<Option<SyncSender<J>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<J: Send + 'static> Queue<J> {
    /// Starts a thread of this name, which gets the jobs in the order in which they come.
    ///
    /// `path` is the cache that an error names.
    pub(super) fn start(
        name: &str,
        path: &Path,
        run: impl FnOnce(&Receiver<J>) + Send + 'static,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(MAX_QUEUED_JOBS);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&receiver))
            .map_err(|source| Error::CacheUnopenable {
                path: path.to_owned(),
                reason: format!("its thread {name} cannot be started: {source}"),
            })?;
        Ok(Self {
            sender: RwLock::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Queues a job and waits while the queue is full; false, and the job dropped, if the thread is gone.
    pub(super) fn push(&self, job: J) -> bool {
        let sender = self.sender.read().unwrap_or_else(PoisonError::into_inner);
        sender
            .as_ref()
            .is_some_and(|sender| sender.send(job).is_ok())
    }

    /// Returns after the thread has done everything that was queued.
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
