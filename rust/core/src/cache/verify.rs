//! Whether a cache holds what was stored in it.

use super::fork;
use super::reader::{Fault, Reader};
use crate::error::Result;

/// Rows checked in one stay inside the gate.
const NUM_ROWS_AT_ONCE: usize = 512;

/// What a check of a whole cache found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verification {
    /// Rows that were checked.
    pub num_rows: u64,
    /// What is wrong, a line each, and with the row where it is in one.
    pub problems: Vec<String>,
}

/// Checks the structure of the database, then every row against its hashes.
///
/// `keep_going` is asked now and then; when it says no, what was found so far comes back.
pub(super) fn verify(reader: &Reader, keep_going: &dyn Fn() -> bool) -> Result<Verification> {
    let mut verification = Verification {
        num_rows: 0,
        problems: check_structure(reader)?,
    };
    let mut last_id = i64::MIN;
    while keep_going() {
        let inside = fork::enter();
        let ids = reader.with_connection(|connection| {
            Ok(match connection.ids_after(last_id, NUM_ROWS_AT_ONCE) {
                Ok(ids) => Ok(ids),
                Err(error) => Err(format!(
                    "the rows after {last_id} cannot be listed: {error}"
                )),
            })
        })?;
        let ids = match ids {
            Ok(ids) => ids,
            Err(problem) => {
                verification.problems.push(problem);
                break;
            }
        };
        let Some(&last) = ids.last() else { break };
        last_id = last;
        verification.num_rows += ids.len() as u64;
        for id in ids {
            verification.problems.extend(check_row(reader, id)?);
        }
        drop(inside);
    }
    Ok(verification)
}

/// What `SQLite`'s own check and the references between tables say.
fn check_structure(reader: &Reader) -> Result<Vec<String>> {
    let _inside = fork::enter();
    reader.with_connection(|connection| {
        let mut statement = connection.prepare("PRAGMA integrity_check")?;
        let lines: rusqlite::Result<Vec<String>> =
            statement.query_map([], |row| row.get(0))?.collect();
        Ok(match lines {
            Ok(lines) => lines.into_iter().filter(|line| line != "ok").collect(),
            Err(error) => vec![format!("the structure cannot be checked: {error}")],
        })
    })
}

fn check_row(reader: &Reader, id: i64) -> Result<Option<String>> {
    reader.with_connection(|connection| {
        Ok(match connection.entry(id) {
            Ok(_) => None,
            Err(Fault::Damage { id, reason }) => Some(format!("row {id}: {reason}")),
            Err(Fault::Engine(error)) => Some(format!("row {id}: {error}")),
        })
    })
}
