//! Text into less space: zstd, with a dictionary once there is one.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rusqlite::{Connection, OptionalExtension};
use zstd::bulk::Compressor;

/// Measured on teacher responses: level 6 saves 6 % more and takes three times as long.
const LEVEL: i32 = 3;

/// Contexts kept for the next text; each holds about a megabyte.
const MAX_SPARE_CONTEXTS: usize = 8;

/// zstd without a dictionary.
pub(super) const NO_DICTIONARY: i64 = 0;

/// A text as a row holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packed {
    /// None for plain UTF-8, 0 for zstd, else zstd with the dictionary of that id.
    pub(super) compression: Option<i64>,
    pub(super) data: Vec<u8>,
}

/// Packs texts, on any number of threads.
pub(super) struct Packer {
    /// None: texts stay plain.
    scheme: Option<RwLock<Arc<Scheme>>>,
}

/// One way to compress.
struct Scheme {
    dictionary_id: i64,
    dictionary: Vec<u8>,
    spare: Mutex<Vec<Compressor<'static>>>,
}

impl Packer {
    /// Leaves every text as it is.
    pub(super) fn plain() -> Self {
        Self { scheme: None }
    }

    /// Compresses, with the dictionary if there is one.
    pub(super) fn zstd(dictionary: Option<(i64, Vec<u8>)>) -> Self {
        let (id, dictionary) = dictionary.unwrap_or((NO_DICTIONARY, Vec::new()));
        Self {
            scheme: Some(RwLock::new(Arc::new(Scheme::new(id, dictionary)))),
        }
    }

    /// Whether a dictionary would help.
    pub(super) fn wants_dictionary(&self) -> bool {
        self.scheme()
            .is_some_and(|scheme| scheme.dictionary_id == NO_DICTIONARY)
    }

    /// From now on the dictionary is used, which must be in the database already.
    pub(super) fn use_dictionary(&self, id: i64, dictionary: Vec<u8>) {
        if let Some(scheme) = &self.scheme {
            *scheme.write().unwrap_or_else(PoisonError::into_inner) =
                Arc::new(Scheme::new(id, dictionary));
        }
    }

    /// `text` in the current scheme, or plain if it gains nothing.
    pub(super) fn pack(&self, text: &str) -> Packed {
        let packed = self.scheme().and_then(|scheme| {
            let data = scheme.compress(text)?;
            (data.len() < text.len()).then_some(Packed {
                compression: Some(scheme.dictionary_id),
                data,
            })
        });
        packed.unwrap_or_else(|| Packed {
            compression: None,
            data: text.as_bytes().to_vec(),
        })
    }

    fn scheme(&self) -> Option<Arc<Scheme>> {
        let scheme = self.scheme.as_ref()?.read();
        Some(Arc::clone(&scheme.unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Scheme {
    fn new(dictionary_id: i64, dictionary: Vec<u8>) -> Self {
        Self {
            dictionary_id,
            dictionary,
            spare: Mutex::new(Vec::new()),
        }
    }

    /// None if zstd fails, for which only a lack of memory is known as a cause: plain is always right.
    fn compress(&self, text: &str) -> Option<Vec<u8>> {
        let spare = self.lock_spare().pop();
        let mut context = match spare {
            Some(context) => context,
            None => Compressor::with_dictionary(LEVEL, &self.dictionary).ok()?,
        };
        let data = context.compress(text.as_bytes()).ok()?;
        let mut spare = self.lock_spare();
        if spare.len() < MAX_SPARE_CONTEXTS {
            spare.push(context);
        }
        Some(data)
    }

    fn lock_spare(&self) -> std::sync::MutexGuard<'_, Vec<Compressor<'static>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The newest dictionary of the database.
pub(super) fn newest_dictionary(
    connection: &Connection,
) -> rusqlite::Result<Option<(i64, Vec<u8>)>> {
    connection
        .query_row(
            "SELECT id, data FROM dictionaries ORDER BY id DESC LIMIT 1",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()
}
