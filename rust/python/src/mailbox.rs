//! The class `Mailbox`: outcomes for an event loop, without the interpreter's lock.
//!
//! The thread that writes a cache must not wait for Python. It leaves outcomes here and rings a socket,
//! which the loop listens on as on any other.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use gad_fast_core::Result;
use pyo3::prelude::*;

/// The token of a put and its outcome; None if the writer ended before it.
type Outcome = (u64, Option<Result<bool>>);

/// Outcomes on their way to one event loop.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct Mailbox {
    shared: Arc<Shared>,
    bell: UnixStream,
}

struct Shared {
    outcomes: Mutex<Vec<Outcome>>,
    rope: UnixStream,
}

#[pymethods]
impl Mailbox {
    #[new]
    fn new() -> PyResult<Self> {
        let (rope, bell) = UnixStream::pair()?;
        rope.set_nonblocking(true)?;
        bell.set_nonblocking(true)?;
        let outcomes = Mutex::new(Vec::new());
        Ok(Self {
            shared: Arc::new(Shared { outcomes, rope }),
            bell,
        })
    }

    fn fileno(&self) -> i32 {
        self.bell.as_raw_fd()
    }
}

impl Mailbox {
    /// What came since the last call.
    pub(crate) fn take(&self) -> Vec<Outcome> {
        // Silence first: an outcome that comes after it rings again.
        let mut rings = [0; 64];
        while matches!((&self.bell).read(&mut rings), Ok(count) if count > 0) {}
        std::mem::take(&mut *self.shared.lock())
    }

    /// An envelope for the outcome of the put with `token`.
    pub(crate) fn letter(&self, token: u64) -> Letter {
        Letter {
            shared: Arc::clone(&self.shared),
            token,
            is_sent: false,
        }
    }
}

/// An outcome to come; if it never does, the mailbox is told so.
pub(crate) struct Letter {
    shared: Arc<Shared>,
    token: u64,
    is_sent: bool,
}

impl Letter {
    pub(crate) fn send(mut self, outcome: Result<bool>) {
        self.is_sent = true;
        self.shared.post((self.token, Some(outcome)));
    }
}

impl Drop for Letter {
    fn drop(&mut self) {
        if !self.is_sent {
            self.shared.post((self.token, None));
        }
    }
}

impl Shared {
    fn post(&self, outcome: Outcome) {
        let mut outcomes = self.lock();
        outcomes.push(outcome);
        if outcomes.len() == 1 {
            // If the socket is full, it is ringing.
            drop((&self.rope).write(&[1]));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Outcome>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
