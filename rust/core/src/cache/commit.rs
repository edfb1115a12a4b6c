//! Rows into the database, a transaction at a time.

use std::collections::HashMap;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ToSql, params};

use super::compression::{Packed, Packer};
use super::entry::{Request, Response};
use super::key::{Key, SHORT_HASH_BYTES, content_hash, prompt_hash};

/// A row with all its work done, but for the writing.
pub(super) struct PackedEntry {
    key: Key,
    teacher: String,
    sampling: String,
    sample_index: u32,
    prompt_hash: [u8; SHORT_HASH_BYTES],
    prompt: Packed,
    finish_reason: Option<String>,
    num_prompt_tokens: Option<i64>,
    num_response_tokens: Option<i64>,
    cost: Option<f64>,
    created: f64,
    /// As JSON; None for no flags.
    flags: Option<String>,
    content_hash: [u8; SHORT_HASH_BYTES],
    text: Packed,
}

impl PackedEntry {
    /// Hashes and compresses: to be called on another thread than the one that writes.
    pub(super) fn new(packer: &Packer, request: Request, response: Response) -> Self {
        let key = Key::of(&request);
        let flags = &response.flags;
        Self {
            key,
            sample_index: request.sample_index,
            prompt_hash: prompt_hash(&request.messages),
            prompt: packer.pack(&request.messages),
            teacher: request.teacher,
            sampling: request.sampling,
            num_prompt_tokens: response.num_prompt_tokens,
            num_response_tokens: response.num_response_tokens,
            cost: response.cost,
            created: response.created,
            flags: (!flags.is_empty()).then(|| serde_json::json!(flags).to_string()),
            content_hash: content_hash(&key, &response),
            text: packer.pack(&response.text),
            finish_reason: response.finish_reason,
        }
    }
}

/// Plain text as TEXT, which any tool can read.
impl ToSql for Packed {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self.compression {
            None => ValueRef::Text(&self.data),
            Some(_) => ValueRef::Blob(&self.data),
        }))
    }
}

/// Prompts whose ids are kept: several answers to one chat come close together.
const MAX_KNOWN_PROMPTS: usize = 4096;

/// The connection that writes.
pub(super) struct Committer {
    connection: Connection,
    /// Ids of what was asked, by sampling within teacher.
    teacher_ids: HashMap<String, HashMap<String, i64>>,
    /// Ids of the prompts that came last, by hash.
    prompt_ids: HashMap<[u8; SHORT_HASH_BYTES], i64>,
}

impl Committer {
    pub(super) fn new(connection: Connection) -> Self {
        // Every statement below stays prepared.
        connection.set_prepared_statement_cache_capacity(32);
        Self {
            connection,
            teacher_ids: HashMap::new(),
            prompt_ids: HashMap::new(),
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn begin(&self) -> rusqlite::Result<()> {
        self.execute("BEGIN IMMEDIATE")
    }

    /// Returns after the rows since `begin` are on disk.
    pub(super) fn commit(&self) -> rusqlite::Result<()> {
        self.execute("COMMIT")
    }

    /// Forgets the rows since `begin`.
    pub(super) fn roll_back(&mut self) {
        // SQLite rolls back by itself after some errors; then this one has nothing to do.
        drop(self.execute("ROLLBACK"));
        self.teacher_ids.clear();
        self.prompt_ids.clear();
    }

    /// Whether the row is new: of equal requests, the first response stays.
    pub(super) fn insert(&mut self, entry: &PackedEntry) -> rusqlite::Result<bool> {
        let teacher_id = self.teacher_id(&entry.teacher, &entry.sampling)?;
        let prompt_id = self.prompt_id(entry)?;
        let num_changed = self
            .connection
            .prepare_cached(
                "INSERT OR IGNORE INTO responses (key, teacher_id, prompt_id, sample_index,
                     finish_reason, num_prompt_tokens, num_response_tokens, cost, created, flags,
                     hash, compression, data)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            )?
            .execute(params![
                entry.key.0,
                teacher_id,
                prompt_id,
                entry.sample_index,
                entry.finish_reason,
                entry.num_prompt_tokens,
                entry.num_response_tokens,
                entry.cost,
                entry.created,
                entry.flags,
                entry.content_hash,
                entry.text.compression,
                entry.text,
            ])?;
        Ok(num_changed > 0)
    }

    /// Stores a dictionary and gives its id.
    pub(super) fn insert_dictionary(&self, dictionary: &[u8]) -> rusqlite::Result<i64> {
        self.connection
            .execute("INSERT INTO dictionaries (data) VALUES (?1)", [dictionary])?;
        Ok(self.connection.last_insert_rowid())
    }

    /// Copies the log into the database and empties it, unless a reader needs it still.
    pub(super) fn checkpoint(&self) -> rusqlite::Result<()> {
        // Without waiting: callers do wait.
        self.connection.busy_timeout(std::time::Duration::ZERO)?;
        let outcome = self.execute("PRAGMA wal_checkpoint(TRUNCATE)");
        self.connection.busy_timeout(super::schema::PATIENCE)?;
        outcome
    }

    fn execute(&self, statement: &str) -> rusqlite::Result<()> {
        let mut statement = self.connection.prepare_cached(statement)?;
        // A pragma answers with a row, which `execute` would call an error.
        statement.raw_query().next().map(drop)
    }

    fn teacher_id(&mut self, teacher: &str, sampling: &str) -> rusqlite::Result<i64> {
        let known = self
            .teacher_ids
            .get(teacher)
            .and_then(|ids| ids.get(sampling));
        if let Some(&id) = known {
            return Ok(id);
        }
        self.connection
            .prepare_cached("INSERT OR IGNORE INTO teachers (name, sampling) VALUES (?1, ?2)")?
            .execute([teacher, sampling])?;
        let id = self
            .connection
            .prepare_cached("SELECT id FROM teachers WHERE name = ?1 AND sampling = ?2")?
            .query_row([teacher, sampling], |row| row.get(0))?;
        let ids = self.teacher_ids.entry(teacher.to_owned()).or_default();
        ids.insert(sampling.to_owned(), id);
        Ok(id)
    }

    fn prompt_id(&mut self, entry: &PackedEntry) -> rusqlite::Result<i64> {
        if let Some(&id) = self.prompt_ids.get(&entry.prompt_hash) {
            return Ok(id);
        }
        let id = self.insert_prompt(entry)?;
        if self.prompt_ids.len() == MAX_KNOWN_PROMPTS {
            self.prompt_ids.clear();
        }
        self.prompt_ids.insert(entry.prompt_hash, id);
        Ok(id)
    }

    fn insert_prompt(&self, entry: &PackedEntry) -> rusqlite::Result<i64> {
        // A prompt that is not among the last ones is new, most likely: one search of the index.
        let num_changed = self
            .connection
            .prepare_cached(
                "INSERT OR IGNORE INTO prompts (hash, compression, data) VALUES (?1, ?2, ?3)",
            )?
            .execute(params![
                entry.prompt_hash,
                entry.prompt.compression,
                entry.prompt
            ])?;
        if num_changed > 0 {
            return Ok(self.connection.last_insert_rowid());
        }
        self.connection
            .prepare_cached("SELECT id FROM prompts WHERE hash = ?1")?
            .query_row([entry.prompt_hash], |row| row.get(0))
    }
}
