//! A thread that packs rows for callers who have no time for it: event loops.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::commit::PackedEntry;
use super::compression::Packer;
use super::entry::{Request, Response};
use super::fork;
use super::writer::{Receipt, Writer};
use crate::error::{Error, Result};

/// Rows on their way: a caller that is further ahead waits.
const MAX_QUEUED_ROWS: usize = 1024;

/// How long the thread sleeps, once, after rows came close together, before it waits to be woken.
///
/// To be woken by every row would take as long as to pack it.
const NAP: Duration = Duration::from_micros(100);

struct Job {
    request: Request,
    response: Response,
    receipt: Receipt,
}

/// The callers' end.
pub(super) struct PackingThread {
    writer: Arc<Writer>,
    /// None after `close`.
    sender: RwLock<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl PackingThread {
    /// Starts the thread, which hands rows on to `writer` in the order in which they come.
    pub(super) fn start(path: &Path, packer: Arc<Packer>, writer: &Arc<Writer>) -> Result<Self> {
        let (sender, receiver) = sync_channel(MAX_QUEUED_ROWS);
        let press = Press {
            packer,
            writer: Arc::clone(writer),
        };
        let thread = std::thread::Builder::new()
            .name("gad-fast-packer".to_owned())
            .spawn(move || press.run(&receiver))
            .map_err(|source| Error::CacheUnopenable {
                path: path.to_owned(),
                reason: format!("its packing thread cannot be started: {source}"),
            })?;
        Ok(Self {
            writer: Arc::clone(writer),
            sender: RwLock::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Queues a row; waits while the queue is full.
    pub(super) fn push(
        &self,
        request: Request,
        response: Response,
        receipt: Receipt,
    ) -> Result<()> {
        let job = Job {
            request,
            response,
            receipt,
        };
        let sender = self.sender.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_ref() else {
            return Err(self.writer.gone());
        };
        sender.send(job).map_err(|_| self.writer.gone())
    }

    /// Returns after everything that was queued is handed on.
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

/// What the thread holds.
struct Press {
    packer: Arc<Packer>,
    writer: Arc<Writer>,
}

impl Press {
    fn run(&self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            self.pack(first);
            while self.pack_queued(jobs) {
                std::thread::sleep(NAP);
            }
        }
    }

    /// Packs what is queued; whether there was anything.
    fn pack_queued(&self, jobs: &Receiver<Job>) -> bool {
        jobs.try_iter().map(|job| self.pack(job)).count() > 0
    }

    fn pack(&self, job: Job) {
        let inside = fork::enter();
        let entry = PackedEntry::new(&self.packer, job.request, job.response);
        drop(inside);
        // If the writer is gone, the receipt is dropped, which says so.
        drop(self.writer.push(entry, job.receipt));
    }
}
