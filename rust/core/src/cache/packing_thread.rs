//! A thread that packs rows for callers who have no time for it: event loops.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::commit::PackedEntry;
use super::compression::Packer;
use super::entry::{Request, Response};
use super::fork;
use super::queue::Queue;
use super::writer::{Receipt, Writer};
use crate::error::Result;

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
    queue: Queue<Job>,
}

impl PackingThread {
    /// Starts the thread, which hands rows on to `writer` in the order in which they come.
    pub(super) fn start(path: &Path, packer: Arc<Packer>, writer: &Arc<Writer>) -> Result<Self> {
        let press = Press {
            packer,
            writer: Arc::clone(writer),
        };
        Ok(Self {
            writer: Arc::clone(writer),
            queue: Queue::start("gad-fast-packer", path, move |jobs| press.run(jobs))?,
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
        if self.queue.push(job) {
            Ok(())
        } else {
            Err(self.writer.gone())
        }
    }

    /// Returns after everything that was queued is handed on.
    pub(super) fn close(&self) {
        self.queue.close();
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
