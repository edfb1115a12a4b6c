//! Reading, on any number of threads and in other processes than the writer's.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row};

use super::compression::Unpacker;
use super::entry::{Request, Response, StoredEntry};
use super::failure::from_sqlite;
use super::key::{Key, SHORT_HASH_BYTES, content_hash, prompt_hash};
use super::schema::open_for_reading;
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

const CONTAINS: &str = "SELECT 1 FROM prompts p JOIN responses r ON r.prompt_id = p.id \
     WHERE p.hash = ?1 AND r.key = ?2";

const SELECT_RESPONSE: &str = "SELECT r.id, r.key, r.finish_reason, r.num_prompt_tokens, \
     r.num_response_tokens, r.cost, r.created, r.flags, r.hash, r.compression, r.data \
     FROM prompts p JOIN responses r ON r.prompt_id = p.id WHERE p.hash = ?1 AND r.key = ?2";

const SELECT_ENTRY: &str = "SELECT r.id, r.key, r.finish_reason, r.num_prompt_tokens, \
     r.num_response_tokens, r.cost, r.created, r.flags, r.hash, r.compression, r.data, \
     r.sample_index, t.name, t.sampling, p.hash, p.compression, p.data \
     FROM responses r LEFT JOIN teachers t ON t.id = r.teacher_id \
     LEFT JOIN prompts p ON p.id = r.prompt_id WHERE r.id = ?1";

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

/// The row, or what is wrong with it.
fn read_entry(
    connection: &Connection,
    unpacker: &mut Unpacker,
    row: &Row<'_>,
) -> std::result::Result<StoredEntry, String> {
    let (key, response) = read_response(connection, unpacker, row)?;
    let request = read_request(connection, unpacker, row)?;
    check_key(key, Key::of(&request))?;
    Ok(StoredEntry {
        id: value(row, 0)?,
        request,
        response,
    })
}

fn read_request(
    connection: &Connection,
    unpacker: &mut Unpacker,
    row: &Row<'_>,
) -> std::result::Result<Request, String> {
    let prompt_data = cell(row, 16)?;
    if prompt_data == ValueRef::Null {
        return Err("its prompt is missing".to_owned());
    }
    let request = Request {
        sample_index: value(row, 11)?,
        teacher: value(row, 12)?,
        sampling: value(row, 13)?,
        messages: unpacker.unpack(connection, value(row, 15)?, prompt_data)?,
    };
    if prompt_hash(&request.messages) != value::<[u8; SHORT_HASH_BYTES]>(row, 14)? {
        return Err("its prompt does not fit the prompt's hash".to_owned());
    }
    Ok(request)
}

fn read_response(
    connection: &Connection,
    unpacker: &mut Unpacker,
    row: &Row<'_>,
) -> std::result::Result<(Key, Response), String> {
    let key = Key(value(row, 1)?);
    let flags: Option<String> = value(row, 7)?;
    let response = Response {
        finish_reason: value(row, 2)?,
        num_prompt_tokens: value(row, 3)?,
        num_response_tokens: value(row, 4)?,
        cost: value(row, 5)?,
        created: value(row, 6)?,
        flags: match flags {
            Some(json) => serde_json::from_str(&json)
                .map_err(|error| format!("its flags cannot be read: {error}"))?,
            None => Vec::new(),
        },
        text: unpacker.unpack(connection, value(row, 9)?, cell(row, 10)?)?,
    };
    if content_hash(&key, &response) != value::<[u8; SHORT_HASH_BYTES]>(row, 8)? {
        return Err("its content does not fit its hash".to_owned());
    }
    Ok((key, response))
}

fn check_key(stored: Key, computed: Key) -> std::result::Result<(), String> {
    if stored == computed {
        return Ok(());
    }
    Err(format!("its key is {stored}, its content has {computed}"))
}

/// A value of a row; a wrong type is damage, as `SQLite` itself keeps types.
fn value<T: rusqlite::types::FromSql>(
    row: &Row<'_>,
    column: usize,
) -> std::result::Result<T, String> {
    row.get(column).map_err(|error| error.to_string())
}

fn cell<'a>(row: &'a Row<'_>, column: usize) -> std::result::Result<ValueRef<'a>, String> {
    row.get_ref(column).map_err(|error| error.to_string())
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
