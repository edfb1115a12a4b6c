//! One writer at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use super::file_system::beside;
use crate::error::{Error, Result};

/// Held while a process may write to a cache.
///
/// An advisory lock on a file beside the database, which the system takes back when the process dies. It
/// holds the process id of the writer, for the message that the next one gets.
#[derive(Debug)]
pub(super) struct WriterLock {
    _file: File,
}

impl WriterLock {
    /// Takes the lock of the cache at `path`, without waiting.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let unopenable = |source: &std::io::Error| Error::CacheUnopenable {
            path: path.to_owned(),
            reason: format!("its lock file cannot be used: {source}"),
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(beside(path, "-lock"))
            .map_err(|source| unopenable(&source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let process_id = read_process_id(&mut file);
                return Err(Error::CacheLocked {
                    path: path.to_owned(),
                    process_id,
                });
            }
            Err(TryLockError::Error(source)) => return Err(unopenable(&source)),
        }
        // The number is for a message only: a full disk must not keep a cache from being opened.
        drop(write_process_id(&mut file));
        Ok(Self { _file: file })
    }
}

fn read_process_id(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn write_process_id(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn the_second_writer_is_told_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let first = WriterLock::take(&path).unwrap();
        let error = WriterLock::take(&path).unwrap_err();
        assert!(
            matches!(error, Error::CacheLocked { process_id, .. } if process_id == Some(std::process::id()))
        );
        drop(first);
        WriterLock::take(&path).unwrap();
    }

    #[test]
    fn a_lock_in_a_folder_that_is_not_there_names_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none/cache");
        let message = WriterLock::take(&path).unwrap_err().to_string();
        assert!(message.contains("none/cache"), "{message}");
    }
}
