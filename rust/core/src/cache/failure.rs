//! What `SQLite` says, in our words.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::file_system::free_bytes;
use crate::error::Error;

/// A group of rows could not be committed; each of its callers is told.
#[derive(Debug, Clone)]
pub(super) struct WriteFailure {
    path: PathBuf,
    reason: String,
    free_bytes: Option<u64>,
    /// After a failed fsync the system forgets what it had not written: no later one can be trusted.
    pub(super) is_final: bool,
}

impl WriteFailure {
    pub(super) fn new(path: &Path, error: &rusqlite::Error) -> Self {
        let is_final = error.sqlite_error().is_some_and(|error| {
            matches!(
                error.extended_code,
                rusqlite::ffi::SQLITE_IOERR_FSYNC | rusqlite::ffi::SQLITE_IOERR_DIR_FSYNC
            )
        });
        Self {
            path: path.to_owned(),
            reason: error.to_string(),
            free_bytes: free_bytes(path),
            is_final,
        }
    }

    pub(super) fn to_error(&self) -> Error {
        Error::CacheNotWritten {
            path: self.path.clone(),
            reason: self.reason.clone(),
            free: match self.free_bytes {
                Some(bytes) => format!("{bytes} bytes are free there"),
                None => "the free space there is unknown".to_owned(),
            },
        }
    }
}

/// The error for what went wrong while reading or opening the cache at `path`.
pub(super) fn from_sqlite(path: &Path, error: &rusqlite::Error) -> Error {
    let path = path.to_owned();
    let reason = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => Error::CacheNotACache {
            path,
            reason: "it is no SQLite database".to_owned(),
        },
        Some(ErrorCode::DatabaseCorrupt) => Error::CacheCorrupt {
            path,
            place: "the file".to_owned(),
            reason,
        },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Error::CacheLocked {
            path,
            process_id: None,
        },
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
            Error::CacheUnopenable { path, reason }
        }
        Some(ErrorCode::DiskFull) => WriteFailure::new(&path, error).to_error(),
        Some(_) => Error::CacheEngine { path, reason },
        // No error of SQLite: a value that has not the type which it was written with.
        None => Error::CacheCorrupt {
            path,
            place: "a value".to_owned(),
            reason,
        },
    }
}
