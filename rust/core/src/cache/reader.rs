//! Reading, on any number of threads and in other processes than the writer's.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rusqlite::{Connection, OptionalExtension};

use super::entry::{Request, Response, StoredEntry};
use super::failure::from_sqlite;
use super::key::{Key, prompt_hash};
use super::row::{CONTAINS, SELECT_ENTRY, SELECT_RESPONSE, check_key, read_entry, read_response};
use super::schema::open_for_reading;
use super::unpacking::Unpacker;
use crate::error::{Error, Result};

/// Connections kept for the next call.
const MAX_SPARE_CONNECTIONS: usize = 8;

/// Read connections to one cache: a call takes one and gives it back.
pub(super) struct Reader {
    path: PathBuf,
    spare: Mutex<Spare>,
}

struct Spare {
    process_id: u32,
    connections: Vec<ReadConnection>,
}

impl Reader {
    /// Opens nothing yet.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            spare: Mutex::new(Spare {
                process_id: std::process::id(),
                connections: Vec::new(),
            }),
        }
    }

    /// The response of a request.
    pub(super) fn get(&self, request: &Request) -> Result<Option<Response>> {
        self.with_connection(|connection| connection.response(request))
    }

    pub(super) fn contains(&self, request: &Request) -> Result<bool> {
        self.with_connection(|connection| {
            connection
                .prepare_cached(CONTAINS)?
                .exists((prompt_hash(&request.messages), Key::of(request).0))
                .map_err(Fault::from)
        })
    }

    /// At most `limit` rows after the one with `id`, in the order in which they were stored.
    pub(super) fn entries_after(&self, id: i64, limit: usize) -> Result<Vec<StoredEntry>> {
        self.with_connection(|connection| {
            let ids = connection.ids_after(id, limit)?;
            ids.into_iter().map(|id| connection.entry(id)).collect()
        })
    }

    /// Runs `work` on a connection of this process.
    pub(super) fn with_connection<T>(
        &self,
        work: impl FnOnce(&mut ReadConnection) -> std::result::Result<T, Fault>,
    ) -> Result<T> {
        let mut connection = match self.take_spare() {
            Some(connection) => connection,
            None => ReadConnection::open(&self.path)?,
        };
        let outcome = work(&mut connection);
        let mut spare = self.lock_spare();
        if spare.connections.len() < MAX_SPARE_CONNECTIONS {
            spare.connections.push(connection);
        }
        drop(spare);
        outcome.map_err(|fault| fault.into_error(&self.path))
    }

    fn take_spare(&self) -> Option<ReadConnection> {
        let mut spare = self.lock_spare();
        let process_id = std::process::id();
        if spare.process_id != process_id {
            // They belong to the process that forked this one: closing them here would break its locks.
            std::mem::forget(std::mem::take(&mut spare.connections));
            spare.process_id = process_id;
        }
        spare.connections.pop()
    }

    fn lock_spare(&self) -> std::sync::MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _inside = super::fork::enter();
        let spare = self.lock_spare();
        if spare.process_id != std::process::id() {
            drop(spare);
            drop(self.take_spare());
        }
    }
}

/// What can go wrong while reading.
pub(super) enum Fault {
    /// `SQLite` fails.
    Engine(rusqlite::Error),
    /// A row does not hold what was stored.
    Damage {
        /// The row.
        id: i64,
        /// What is wrong.
        reason: String,
    },
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Engine(error)
    }
}

impl Fault {
    fn into_error(self, path: &Path) -> Error {
        match self {
            Self::Engine(error) => from_sqlite(path, &error),
            Self::Damage { id, reason } => Error::CacheCorrupt {
                path: path.to_owned(),
                place: format!("row {id}"),
                reason,
            },
        }
    }
}

/// A connection, with what it needs to unpack texts.
pub(super) struct ReadConnection {
    connection: Connection,
    unpacker: Unpacker,
}

impl std::ops::Deref for ReadConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl ReadConnection {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            connection: open_for_reading(path)?,
            unpacker: Unpacker::default(),
        })
    }

    fn response(&mut self, request: &Request) -> std::result::Result<Option<Response>, Fault> {
        let key = Key::of(request);
        let Self {
            connection,
            unpacker,
        } = self;
        let mut statement = connection.prepare_cached(SELECT_RESPONSE)?;
        let response = statement
            .query_row((prompt_hash(&request.messages), key.0), |row| {
                let id = row.get(0)?;
                Ok(read_response(connection, unpacker, row)
                    .and_then(|(stored, response)| check_key(stored, key).map(|()| response))
                    .map_err(|reason| Fault::Damage { id, reason }))
            })
            .optional()?;
        response.transpose()
    }

    /// The row with `id`, checked against its hashes.
    pub(super) fn entry(&mut self, id: i64) -> std::result::Result<StoredEntry, Fault> {
        let Self {
            connection,
            unpacker,
        } = self;
        let mut statement = connection.prepare_cached(SELECT_ENTRY)?;
        statement.query_row([id], |row| {
            Ok(
                read_entry(connection, unpacker, row)
                    .map_err(|reason| Fault::Damage { id, reason }),
            )
        })?
    }

    pub(super) fn ids_after(&self, id: i64, limit: usize) -> rusqlite::Result<Vec<i64>> {
        self.prepare_cached("SELECT id FROM responses WHERE id > ?1 ORDER BY id LIMIT ?2")?
            .query_map((id, limit), |row| row.get(0))?
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::cache::schema::open_for_writing;

    #[test]
    fn a_look_up_searches_indices_and_scans_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let connection = open_for_writing(&folder.path().join("cache")).unwrap();
        for statement in [CONTAINS, SELECT_RESPONSE] {
            let plan: Vec<String> = connection
                .prepare(&format!("EXPLAIN QUERY PLAN {statement}"))
                .unwrap()
                .query_map(([0; 16], [0; 32]), |row| row.get(3))
                .unwrap()
                .collect::<rusqlite::Result<_>>()
                .unwrap();
            assert_eq!(plan.len(), 2, "{plan:?}");
            assert!(
                plan.iter().all(|step| step.starts_with("SEARCH")),
                "{plan:?}"
            );
        }
    }
}
