//! The database: how it is opened, known for ours, and laid out.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::failure::from_sqlite;
use super::file_system::{refuse_network, sync_folder};
use crate::error::{Error, Result};

/// The version of the layout of new caches.
///
/// 1 had an index on `key`, and none on the prompt. All statements find their way in both.
pub(super) const FORMAT_VERSION: i32 = 2;

/// `gadc`, in the header of the file.
const APPLICATION_ID: i32 = 0x6761_6463;

/// How long to wait for another program that has the file open, as `sqlite3` or a backup may.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// `compression`: NULL for plain text, 0 for zstd, else zstd with the dictionary of that id.
///
/// A request is found by the hash of its prompt, then among the few rows of that prompt: an index on `key`
/// would write a page of its own for every row, where one that starts with the newest prompt grows at its end.
const LAYOUT: &str = "
CREATE TABLE dictionaries (id INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE teachers (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, sampling TEXT NOT NULL, UNIQUE (name, sampling)
) STRICT;
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, compression INTEGER, data ANY NOT NULL
) STRICT;
CREATE TABLE responses (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    teacher_id INTEGER NOT NULL REFERENCES teachers,
    prompt_id INTEGER NOT NULL REFERENCES prompts,
    sample_index INTEGER NOT NULL,
    finish_reason TEXT,
    num_prompt_tokens INTEGER,
    num_response_tokens INTEGER,
    cost REAL,
    created REAL NOT NULL,
    flags TEXT,
    hash BLOB NOT NULL,
    compression INTEGER,
    data ANY NOT NULL,
    UNIQUE (prompt_id, teacher_id, sample_index)
) STRICT;
";

/// A connection that may write, to a cache which is made if it is not there.
pub(super) fn open_for_writing(path: &Path) -> Result<Connection> {
    refuse_network(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = open(path, flags)?;
    let is_new = check_identity(path, &connection)? == Identity::Empty;
    prepare(path, &connection, is_new).map_err(|error| from_sqlite(path, &error))??;
    if is_new {
        sync_folder(path).map_err(|source| Error::CacheUnopenable {
            path: path.to_owned(),
            reason: format!("its folder cannot be flushed: {source}"),
        })?;
    }
    Ok(connection)
}

/// A connection that cannot write, to a cache which must be there.
pub(super) fn open_for_reading(path: &Path) -> Result<Connection> {
    refuse_network(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = open(path, flags)?;
    match check_identity(path, &connection)? {
        Identity::Ours => Ok(connection),
        Identity::Empty => Err(Error::CacheNotACache {
            path: path.to_owned(),
            reason: "it is empty".to_owned(),
        }),
    }
}

/// Refuses a file that is there and is no cache, and leaves it as it is.
pub(super) fn refuse_others(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    refuse_network(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    check_identity(path, &open(path, flags)?).map(drop)
}

#[derive(PartialEq, Eq)]
enum Identity {
    Ours,
    /// A database without tables: new, or left by a kill while it was made.
    Empty,
}

fn open(path: &Path, flags: OpenFlags) -> Result<Connection> {
    if path.exists() && !path.is_file() {
        return Err(Error::CacheNotACache {
            path: path.to_owned(),
            reason: "it is no file".to_owned(),
        });
    }
    let connection =
        Connection::open_with_flags(path, flags).map_err(|error| from_sqlite(path, &error))?;
    connection
        .busy_timeout(PATIENCE)
        .map_err(|error| from_sqlite(path, &error))?;
    Ok(connection)
}

fn check_identity(path: &Path, connection: &Connection) -> Result<Identity> {
    let (application_id, format_version, num_tables) =
        read_identity(connection).map_err(|error| from_sqlite(path, &error))?;
    match (application_id, format_version) {
        (APPLICATION_ID, 1..=FORMAT_VERSION) => Ok(Identity::Ours),
        (APPLICATION_ID, found) => Err(Error::CacheFormatUnknown {
            path: path.to_owned(),
            found,
            known: FORMAT_VERSION,
        }),
        (0, 0) if num_tables == 0 => Ok(Identity::Empty),
        _ => Err(Error::CacheNotACache {
            path: path.to_owned(),
            reason: "it is another program's SQLite database".to_owned(),
        }),
    }
}

fn read_identity(connection: &Connection) -> rusqlite::Result<(i32, i32, i64)> {
    // One statement, one snapshot: another process may be making the cache.
    connection.query_row(
        "SELECT (SELECT application_id FROM pragma_application_id),
                (SELECT user_version FROM pragma_user_version),
                (SELECT COUNT(*) FROM sqlite_schema)",
        [],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )
}

fn prepare(path: &Path, connection: &Connection, is_new: bool) -> rusqlite::Result<Result<()>> {
    if is_new {
        // A row of some kilobytes then fits a page; it must come before the first table.
        connection.pragma_update(None, "page_size", 8192)?;
    }
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode != "wal" {
        return Ok(Err(Error::CacheUnopenable {
            path: path.to_owned(),
            reason: format!("its file system allows no write-ahead log, only {mode}"),
        }));
    }
    // FULL: a COMMIT returns after the log is on the disk itself.
    connection.pragma_update(None, "synchronous", "FULL")?;
    // In KiB: an insertion finds its place in the indices without reading from the disk.
    connection.pragma_update(None, "cache_size", -(64 << 10))?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    // In pages: 32 MiB of log before it is copied into the database.
    connection.pragma_update(None, "wal_autocheckpoint", 4096)?;
    if is_new {
        connection.execute_batch(&format!(
            "BEGIN IMMEDIATE; {LAYOUT} PRAGMA application_id = {APPLICATION_ID};
             PRAGMA user_version = {FORMAT_VERSION}; COMMIT;"
        ))?;
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_new_cache_is_durable_and_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let connection = open_for_writing(&path).unwrap();
        let read = |name: &str| -> String {
            connection
                .pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0))
                .map(|value| format!("{value:?}"))
                .unwrap()
        };
        assert_eq!(read("journal_mode"), r#"Text("wal")"#);
        assert_eq!(read("synchronous"), "Integer(2)");
        assert_eq!(read("page_size"), "Integer(8192)");
        drop(open_for_reading(&path).unwrap());
        drop(open_for_writing(&path).unwrap());
    }

    #[test]
    fn an_empty_file_becomes_a_cache_but_cannot_be_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        std::fs::write(&path, "").unwrap();
        assert!(open_for_reading(&path).is_err());
        open_for_writing(&path).unwrap();
        open_for_reading(&path).unwrap();
    }
}
