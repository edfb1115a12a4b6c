//! Which Python exception stands for which error of the core.

use std::io;

use gad_fast_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    gad_fast._core,
    TokenizerError,
    PyValueError,
    "A tokenizer file is not understood, or a text cannot be encoded or decoded with it."
);

create_exception!(
    gad_fast._core,
    CacheError,
    PyException,
    "A teacher cache cannot be opened, read or written."
);
create_exception!(
    gad_fast._core,
    CacheCorruptError,
    CacheError,
    "A teacher cache does not hold what was stored in it."
);
create_exception!(
    gad_fast._core,
    CacheLockedError,
    CacheError,
    "Another process writes to the teacher cache."
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
        Error::TokenizerNotUnderstood { .. }
        | Error::Encode { .. }
        | Error::Decode { .. }
        | Error::TextNotUtf8 { .. } => TokenizerError::new_err(error.to_string()),
        Error::IdNegative { .. }
        | Error::OffsetsEmpty
        | Error::StopEmpty { .. }
        | Error::OffsetsMalformed { .. }
        | Error::TokenBudgetTooSmall { .. }
        | Error::TooSmall { .. }
        | Error::Negative { .. }
        | Error::NotFinite { .. }
        | Error::SettingOutOfRange { .. }
        | Error::LengthDiffers { .. }
        | Error::IndexOutOfRange { .. }
        | Error::IdsEmpty { .. }
        | Error::FinishReasonUnknown { .. }
        | Error::StreamUnknown { .. }
        | Error::StreamMissing { .. }
        | Error::StreamRepeated { .. }
        | Error::GroupFull { .. }
        | Error::PromptDiffers { .. }
        | Error::TeacherRepeated { .. }
        | Error::BufferClosed
        | Error::RewardsMissing
        | Error::TooManyTokens { .. }
        | Error::GroupOffsetsCount { .. }
        | Error::BoundariesMalformed { .. }
        | Error::SizeOutOfRange { .. }
        | Error::TooManyRanks { .. }
        | Error::ScheduleTooLarge { .. }
        | Error::NumThreadsInvalid { .. } => PyValueError::new_err(error.to_string()),
        Error::CacheCorrupt { .. } => CacheCorruptError::new_err(error.to_string()),
        Error::CacheLocked { .. } => CacheLockedError::new_err(error.to_string()),
        Error::CacheRequestInvalid { .. }
        | Error::CacheUnopenable { .. }
        | Error::CacheNotACache { .. }
        | Error::CacheFormatUnknown { .. }
        | Error::CacheOnNetwork { .. }
        | Error::CacheNotWritten { .. }
        | Error::CacheEngine { .. }
        | Error::CacheClosed { .. }
        | Error::CacheReadOnly { .. }
        | Error::CacheForked { .. } => CacheError::new_err(error.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}
