//! The class `Cache`, and what must be done around a fork.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gad_fast_core::Result;
use gad_fast_core::cache::{self, Compression, Key, Receipt, Request, Response, TeacherCache};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::cache_row::{
    RequestFields, RequestParts, ResponseParts, from_entry, from_response, to_request, to_response,
};
use crate::errors::to_python;
use crate::mailbox::Mailbox;

/// How often a waiting call looks whether Ctrl-C was pressed.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

type InfoParts = (i32, u64, u64, Vec<String>, bool, u64);

/// Responses of teachers, in one `SQLite` file.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct Cache {
    cache: Arc<TeacherCache>,
}

#[pymethods]
impl Cache {
    #[staticmethod]
    #[pyo3(signature = (path, *, compression))]
    fn open(py: Python<'_>, path: PathBuf, compression: &str) -> PyResult<Self> {
        let compression = match compression {
            "zstd" => Compression::Zstd,
            "none" => Compression::None,
            other => {
                return Err(PyValueError::new_err(format!(
                    "compression must be \"zstd\" or \"none\", got {other:?}"
                )));
            }
        };
        Self::wrap(py.detach(|| TeacherCache::open(path, compression)))
    }

    #[staticmethod]
    fn open_read_only(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Self::wrap(py.detach(|| TeacherCache::open_read_only(path)))
    }

    fn put(
        &self,
        py: Python<'_>,
        request: RequestFields<'_>,
        response: ResponseParts,
    ) -> PyResult<bool> {
        let outcomes = self.put_many(py, vec![(request, response)])?;
        Ok(outcomes.first().copied().unwrap_or_default())
    }

    fn put_many(
        &self,
        py: Python<'_>,
        rows: Vec<(RequestFields<'_>, ResponseParts)>,
    ) -> PyResult<Vec<bool>> {
        let num_rows = rows.len();
        let rows = rows
            .into_iter()
            .map(|(request, response)| Ok((to_request(&request)?, to_response(response))))
            .collect::<PyResult<Vec<_>>>()?;
        let (mut outcomes, mut receiver) = py.detach(|| self.queue(rows)).map_err(to_python)?;
        while outcomes.len() < num_rows {
            match py.detach(|| receive(&mut receiver, num_rows, &mut outcomes)) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => py.check_signals()?,
                Err(RecvTimeoutError::Disconnected) => return Err(to_python(self.cache.lost())),
            }
        }
        outcomes
            .into_iter()
            .map(|outcome| outcome.map_err(to_python))
            .collect()
    }

    /// Returns once the row is queued; its outcome goes to `mailbox` under `token`.
    fn put_soon(
        &self,
        py: Python<'_>,
        request: RequestFields<'_>,
        response: ResponseParts,
        mailbox: &Bound<'_, Mailbox>,
        token: u64,
    ) -> PyResult<()> {
        let (request, response) = (to_request(&request)?, to_response(response));
        let letter = mailbox.get().letter(token);
        let receipt = Box::new(move |outcome| letter.send(outcome));
        // It waits where the queue is full.
        py.detach(|| self.cache.put_soon(request, response, receipt))
            .map_err(to_python)
    }

    /// The outcomes that came to `mailbox` since the last call: a bool, or an exception.
    fn drain(
        &self,
        py: Python<'_>,
        mailbox: &Bound<'_, Mailbox>,
    ) -> PyResult<Vec<(u64, Py<PyAny>)>> {
        let letters = mailbox.get().take();
        letters
            .into_iter()
            .map(|(token, outcome)| {
                let outcome = match outcome.unwrap_or_else(|| Err(self.cache.lost())) {
                    Ok(is_new) => is_new.into_pyobject(py)?.to_owned().into_any().unbind(),
                    Err(error) => to_python(error).into_value(py).into_any(),
                };
                Ok((token, outcome))
            })
            .collect()
    }

    fn get(&self, py: Python<'_>, request: RequestFields<'_>) -> PyResult<Option<ResponseParts>> {
        let request = to_request(&request)?;
        let response = py.detach(|| self.cache.get(&request)).map_err(to_python)?;
        Ok(response.map(from_response))
    }

    fn contains(&self, py: Python<'_>, request: RequestFields<'_>) -> PyResult<bool> {
        let request = to_request(&request)?;
        py.detach(|| self.cache.contains(&request))
            .map_err(to_python)
    }

    fn rows_after(
        &self,
        py: Python<'_>,
        id: i64,
        limit: usize,
    ) -> PyResult<Vec<(i64, RequestParts, ResponseParts)>> {
        let entries = py
            .detach(|| self.cache.entries_after(id, limit))
            .map_err(to_python)?;
        Ok(entries.into_iter().map(from_entry).collect())
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let len = py.detach(|| self.cache.len()).map_err(to_python)?;
        Ok(usize::try_from(len)?)
    }

    fn info(&self, py: Python<'_>) -> PyResult<InfoParts> {
        let info = py.detach(|| self.cache.info()).map_err(to_python)?;
        Ok((
            info.format_version,
            info.num_responses,
            info.num_prompts,
            info.teachers,
            info.has_dictionary,
            info.num_bytes,
        ))
    }

    fn verify(&self, py: Python<'_>) -> PyResult<(u64, Vec<String>)> {
        // What a signal handler raises is raised once: it is kept until the check has stopped.
        let interruption = Mutex::new(None);
        #[expect(
            clippy::redundant_closure_for_method_calls,
            reason = "the method itself is not general enough in its lifetime"
        )]
        let is_calm = || match Python::attach(|py| py.check_signals()) {
            Ok(()) => true,
            Err(error) => {
                *interruption.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                false
            }
        };
        let verification = py.detach(|| self.cache.verify(&is_calm));
        if let Some(error) = interruption
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
        {
            return Err(error);
        }
        let verification = verification.map_err(to_python)?;
        Ok((verification.num_rows, verification.problems))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.cache.close());
    }
}

impl Cache {
    fn wrap(cache: Result<TeacherCache>) -> PyResult<Self> {
        let cache = Arc::new(cache.map_err(to_python)?);
        Ok(Self { cache })
    }

    /// Queues rows; the outcomes come through the channel in the same order.
    #[expect(
        clippy::type_complexity,
        reason = "a pair of what one caller takes apart"
    )]
    fn queue(
        &self,
        rows: Vec<(Request, Response)>,
    ) -> Result<(Vec<Result<bool>>, Receiver<Result<bool>>)> {
        let num_rows = rows.len();
        let (sender, mut receiver) = channel();
        for (request, response) in rows {
            let sender = sender.clone();
            let receipt: Receipt = Box::new(move |outcome| drop(sender.send(outcome)));
            self.cache.put(request, response, receipt)?;
        }
        drop(sender);
        let mut outcomes = Vec::with_capacity(num_rows);
        // The common case needs no second release of the interpreter.
        let _ = receive(&mut receiver, num_rows, &mut outcomes);
        Ok((outcomes, receiver))
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // Closing waits for the disk, and other Python threads should not; at exit there is no attaching.
        let closed = Python::try_attach(|py| py.detach(|| self.cache.close()));
        if closed.is_none() {
            self.cache.close();
        }
    }
}

/// Receives until there are `num_rows` outcomes.
fn receive(
    // Unique, since a receiver is of one thread at a time.
    receiver: &mut Receiver<Result<bool>>,
    num_rows: usize,
    outcomes: &mut Vec<Result<bool>>,
) -> std::result::Result<(), RecvTimeoutError> {
    while outcomes.len() < num_rows {
        outcomes.push(receiver.recv_timeout(SIGNAL_INTERVAL)?);
    }
    Ok(())
}

/// The key of a request, in hexadecimal.
#[pyfunction]
pub(crate) fn cache_key(request: RequestFields<'_>) -> PyResult<String> {
    Ok(Key::of(&to_request(&request)?).to_string())
}

#[pyfunction]
pub(crate) fn cache_before_fork(py: Python<'_>) {
    py.detach(cache::before_fork);
}

#[pyfunction]
pub(crate) fn cache_after_fork() {
    cache::after_fork();
}
