//! Which Python exception stands for which error of the core.

use std::io;

use gad_fast_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    gad_fast._core,
    TokenizerError,
    PyValueError,
    "A tokenizer file is not understood, or a text cannot be encoded or decoded with it."
);

/// The Python exception for `error`.
///
/// Given to `map_err`, because both types are foreign to this crate and `From` may not join them.
pub(crate) fn to_python(error: Error) -> PyErr {
    match error {
        // From its kind, PyO3 chooses FileNotFoundError, PermissionError, ...
        Error::TokenizerUnreadable { ref source, .. } => {
            io::Error::new(source.kind(), error.to_string()).into()
        }
        Error::TokenizerNotUnderstood { .. } | Error::Encode { .. } | Error::Decode { .. } => {
            TokenizerError::new_err(error.to_string())
        }
        Error::IdNegative { .. }
        | Error::OffsetsEmpty
        | Error::OffsetsMalformed { .. }
        | Error::TokenBudgetTooSmall { .. }
        | Error::NumThreadsInvalid { .. } => PyValueError::new_err(error.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}
