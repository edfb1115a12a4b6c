//! One row: how it is selected, and checked against its hashes.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};

use super::entry::{Request, Response, StoredEntry};
use super::key::{Key, SHORT_HASH_BYTES, content_hash, prompt_hash};
use super::unpacking::Unpacker;

pub(super) const CONTAINS: &str = "SELECT 1 FROM prompts p JOIN responses r ON r.prompt_id = p.id \
     WHERE p.hash = ?1 AND r.key = ?2";

pub(super) const SELECT_RESPONSE: &str = "SELECT r.id, r.key, r.finish_reason, r.num_prompt_tokens, \
     r.num_response_tokens, r.cost, r.created, r.flags, r.hash, r.compression, r.data \
     FROM prompts p JOIN responses r ON r.prompt_id = p.id WHERE p.hash = ?1 AND r.key = ?2";

pub(super) const SELECT_ENTRY: &str = "SELECT r.id, r.key, r.finish_reason, r.num_prompt_tokens, \
     r.num_response_tokens, r.cost, r.created, r.flags, r.hash, r.compression, r.data, \
     r.sample_index, t.name, t.sampling, p.hash, p.compression, p.data \
     FROM responses r LEFT JOIN teachers t ON t.id = r.teacher_id \
     LEFT JOIN prompts p ON p.id = r.prompt_id WHERE r.id = ?1";

/// A row of [`SELECT_ENTRY`], or what is wrong with it.
pub(super) fn read_entry(
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

/// Key and response of a row that begins as [`SELECT_RESPONSE`] does, or what is wrong with it.
pub(super) fn read_response(
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

pub(super) fn check_key(stored: Key, computed: Key) -> std::result::Result<(), String> {
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
