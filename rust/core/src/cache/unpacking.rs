//! Text out of what compression made of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension};
use zstd::bulk::Decompressor;

use super::compression::NO_DICTIONARY;
use super::entry::MAX_TEXT_BYTES;

/// Reads packed texts of one connection.
#[derive(Default)]
pub(super) struct Unpacker {
    contexts: HashMap<i64, Decompressor<'static>>,
}

impl Unpacker {
    /// The text, or what is wrong with it.
    pub(super) fn unpack(
        &mut self,
        connection: &Connection,
        compression: Option<i64>,
        data: ValueRef<'_>,
    ) -> Result<String, String> {
        let data = match data {
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
            other => return Err(format!("its text has the type {}", other.data_type())),
        };
        let bytes = match compression {
            None => data.to_vec(),
            Some(id) => self.decompress(connection, id, data)?,
        };
        String::from_utf8(bytes).map_err(|error| format!("its text is no UTF-8: {error}"))
    }

    fn decompress(
        &mut self,
        connection: &Connection,
        dictionary_id: i64,
        data: &[u8],
    ) -> Result<Vec<u8>, String> {
        let damaged =
            |what: &dyn std::fmt::Display| format!("its text cannot be decompressed: {what}");
        // The header says how much to allocate, and may lie.
        let length = zstd::zstd_safe::get_frame_content_size(data)
            .ok()
            .flatten()
            .and_then(|length| usize::try_from(length).ok())
            .filter(|&length| length <= MAX_TEXT_BYTES)
            .ok_or_else(|| damaged(&"its length is missing or impossible"))?;
        self.context(connection, dictionary_id)?
            .decompress(data, length)
            .map_err(|error| damaged(&error))
    }

    fn context(
        &mut self,
        connection: &Connection,
        dictionary_id: i64,
    ) -> Result<&mut Decompressor<'static>, String> {
        Ok(match self.contexts.entry(dictionary_id) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let dictionary = read_dictionary(connection, dictionary_id)?;
                let context = Decompressor::with_dictionary(&dictionary).map_err(|error| {
                    format!("dictionary {dictionary_id} is not usable: {error}")
                })?;
                entry.insert(context)
            }
        })
    }
}

fn read_dictionary(connection: &Connection, id: i64) -> Result<Vec<u8>, String> {
    if id == NO_DICTIONARY {
        return Ok(Vec::new());
    }
    connection
        .query_row("SELECT data FROM dictionaries WHERE id = ?1", [id], |row| {
            row.get(0)
        })
        .optional()
        .map_err(|error| format!("dictionary {id} cannot be read: {error}"))?
        .ok_or_else(|| format!("dictionary {id} is missing"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::cache::compression::{Packed, Packer};

    fn unpack(packed: &Packed) -> Result<String, String> {
        let connection = Connection::open_in_memory().unwrap();
        Unpacker::default().unpack(
            &connection,
            packed.compression,
            ValueRef::Blob(&packed.data),
        )
    }

    #[test]
    fn long_text_shrinks_and_short_text_stays() {
        let packer = Packer::zstd(None);
        let long = "the same again, ".repeat(100);
        let row = packer.pack(&long);
        assert_eq!(row.compression, Some(NO_DICTIONARY));
        assert!(row.data.len() < 100);
        assert_eq!(unpack(&row).unwrap(), long);
        for short in ["", "hm"] {
            assert_eq!(packer.pack(short).compression, None);
            assert_eq!(unpack(&packer.pack(short)).unwrap(), short);
        }
        assert_eq!(Packer::plain().pack(&long).compression, None);
    }

    #[test]
    fn damage_is_an_error_and_allocates_nothing_large() {
        let good = Packer::zstd(None).pack(&"abc ".repeat(100));
        for length in 0..good.data.len() {
            let cut = Packed {
                data: good.data[..length].to_vec(),
                ..good
            };
            assert!(unpack(&cut).is_err());
        }
        // A frame header that promises 2^60 bytes.
        let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
        bomb.extend((1_u64 << 60).to_le_bytes());
        let packed = Packed {
            compression: Some(0),
            data: bomb,
        };
        assert!(unpack(&packed).unwrap_err().contains("length"));
        let missing = Packed {
            compression: Some(9),
            ..good
        };
        assert!(unpack(&missing).is_err());
    }
}
