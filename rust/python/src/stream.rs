//! The class `DecodeStream`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gad_fast_core::tokenize::DecodeStream as CoreStream;
use pyo3::prelude::*;

use crate::errors::to_python;

/// Decodes ids one at a time.
///
/// An id takes about a microsecond: the interpreter is not released, so nobody waits for the lock with
/// it in hand.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct DecodeStream {
    stream: Mutex<CoreStream>,
}

#[pymethods]
impl DecodeStream {
    fn push(&self, id: i32) -> PyResult<String> {
        self.lock().push(id).map_err(to_python)
    }

    fn finish(&self) -> String {
        self.lock().finish()
    }

    #[getter]
    fn is_stopped(&self) -> bool {
        self.lock().is_stopped()
    }
}

impl DecodeStream {
    pub(crate) fn new(stream: CoreStream) -> Self {
        let stream = Mutex::new(stream);
        Self { stream }
    }

    fn lock(&self) -> MutexGuard<'_, CoreStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
