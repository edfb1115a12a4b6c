//! The cache as its users see it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::commit::{Committer, PackedEntry};
use super::compression::{Packer, newest_dictionary};
use super::entry::{Request, Response, StoredEntry};
use super::failure::from_sqlite;
use super::file_system::beside;
use super::fork;
use super::lock::WriterLock;
use super::packing_thread::PackingThread;
use super::reader::Reader;
use super::schema::{open_for_writing, refuse_others};
use super::verify::{self, Verification};
use super::writer::{Receipt, Writer};
use crate::error::{Error, Result};

/// How texts are stored from now on; those that are there stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// In about 0.4 of the space, with a dictionary trained on the first rows.
    #[default]
    Zstd,
    /// As plain text, which any tool that opens `SQLite` can read.
    None,
}

/// Sizes of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheInfo {
    /// The version of its layout.
    pub format_version: i32,
    /// Stored responses.
    pub num_responses: u64,
    /// Different chats among their requests.
    pub num_prompts: u64,
    /// Names of the teachers, sorted.
    pub teachers: Vec<String>,
    /// Whether a compression dictionary was trained.
    pub has_dictionary: bool,
    /// Bytes of the database and its log.
    pub num_bytes: u64,
}

/// Responses of teachers, in one `SQLite` file.
///
/// Shared between threads; after a fork the parent goes on as before, and the child can read.
pub struct TeacherCache {
    path: PathBuf,
    reader: Reader,
    packer: Arc<Packer>,
    /// None if opened for reading. Forgotten rather than dropped in a forked child, which has no such
    /// threads.
    writing: Option<Writing>,
    process_id: u32,
}

/// The two threads behind a cache that may be written.
struct Writing {
    packing_thread: PackingThread,
    writer: Arc<Writer>,
}

impl TeacherCache {
    /// Opens the cache at `path` to read and write, and makes it if it is not there.
    pub fn open(path: impl Into<PathBuf>, compression: Compression) -> Result<Self> {
        let path = path.into();
        let _inside = fork::enter();
        refuse_others(&path)?;
        let lock = WriterLock::take(&path)?;
        let connection = open_for_writing(&path)?;
        let packer = Arc::new(match compression {
            Compression::None => Packer::plain(),
            Compression::Zstd => Packer::zstd(
                newest_dictionary(&connection).map_err(|error| from_sqlite(&path, &error))?,
            ),
        });
        let committer = Committer::new(connection);
        let writer = Arc::new(Writer::start(&path, committer, Arc::clone(&packer), lock)?);
        let packing_thread = PackingThread::start(&path, Arc::clone(&packer), &writer)?;
        let writing = Writing {
            packing_thread,
            writer,
        };
        Ok(Self::new(path, packer, Some(writing)))
    }

    /// Opens the cache at `path` to read, whether or not another process writes to it.
    pub fn open_read_only(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        if !path.exists() {
            return Err(Error::CacheUnopenable {
                path,
                reason: "there is no such file".to_owned(),
            });
        }
        let cache = Self::new(path, Arc::new(Packer::plain()), None);
        let _inside = fork::enter();
        // Opens a connection, which refuses what is no cache.
        cache.reader.with_connection(|_| Ok(()))?;
        Ok(cache)
    }

    fn new(path: PathBuf, packer: Arc<Packer>, writing: Option<Writing>) -> Self {
        Self {
            reader: Reader::new(path.clone()),
            path,
            packer,
            writing,
            process_id: std::process::id(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Packs and queues a row; `receipt` is called once it is on disk, or cannot be.
    ///
    /// Of equal requests, the first response stays. Waits while a thousand rows are queued. An error here
    /// means that `receipt` was dropped uncalled.
    pub fn put(&self, request: Request, response: Response, receipt: Receipt) -> Result<()> {
        let writing = self.writing()?;
        response.check()?;
        let inside = fork::enter();
        let entry = PackedEntry::new(&self.packer, request, response);
        drop(inside);
        writing.writer.push(entry, receipt)
    }

    /// As [`put`](Self::put), but another thread packs.
    pub fn put_soon(&self, request: Request, response: Response, receipt: Receipt) -> Result<()> {
        let writing = self.writing()?;
        response.check()?;
        writing.packing_thread.push(request, response, receipt)
    }

    /// Stores a row and returns after it is on disk: whether it is new.
    pub fn put_and_wait(&self, request: Request, response: Response) -> Result<bool> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let receipt = move |outcome| drop(sender.send(outcome));
        self.put(request, response, Box::new(receipt))?;
        receiver.recv().unwrap_or_else(|_| Err(self.lost()))
    }

    /// The error for a receipt that was dropped: the writer ended before it wrote.
    #[must_use]
    pub fn lost(&self) -> Error {
        match &self.writing {
            Some(writing) => writing.writer.gone(),
            None => self.read_only(),
        }
    }

    /// The response to `request`, if it was stored.
    pub fn get(&self, request: &Request) -> Result<Option<Response>> {
        let _inside = fork::enter();
        self.reader.get(request)
    }

    /// Whether a response to `request` was stored.
    pub fn contains(&self, request: &Request) -> Result<bool> {
        let _inside = fork::enter();
        self.reader.contains(request)
    }

    /// At most `limit` rows after the one with `id`, in the order in which they were stored; 0 is before
    /// the first.
    pub fn entries_after(&self, id: i64, limit: usize) -> Result<Vec<StoredEntry>> {
        let _inside = fork::enter();
        self.reader.entries_after(id, limit)
    }

    /// Number of responses.
    pub fn len(&self) -> Result<u64> {
        let _inside = fork::enter();
        self.reader.with_connection(|connection| {
            Ok(connection
                .prepare_cached("SELECT COUNT(*) FROM responses")?
                .query_row([], |row| row.get(0))?)
        })
    }

    /// Whether there is no response.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Its sizes.
    pub fn info(&self) -> Result<CacheInfo> {
        let num_bytes = [self.path.clone(), beside(&self.path, "-wal")]
            .iter()
            .filter_map(|path| Some(path.metadata().ok()?.len()))
            .sum();
        let num_responses = self.len()?;
        let _inside = fork::enter();
        self.reader.with_connection(|connection| {
            let teachers = connection
                .prepare("SELECT DISTINCT name FROM teachers ORDER BY name")?
                .query_map([], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            let (num_prompts, has_dictionary) = connection.query_row(
                "SELECT (SELECT COUNT(*) FROM prompts), EXISTS (SELECT 1 FROM dictionaries)",
                [],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
            let format_version =
                connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
            Ok(CacheInfo {
                format_version,
                num_responses,
                num_prompts,
                teachers,
                has_dictionary,
                num_bytes,
            })
        })
    }

    /// Checks the database and every row; `keep_going` is asked now and then.
    pub fn verify(&self, keep_going: &dyn Fn() -> bool) -> Result<Verification> {
        verify::verify(&self.reader, keep_going)
    }

    /// Returns after everything queued is on disk; later puts are refused, reading goes on.
    pub fn close(&self) {
        if let Some(writing) = self.writing.as_ref().filter(|_| self.is_at_home()) {
            writing.packing_thread.close();
            writing.writer.close();
        }
    }

    fn writing(&self) -> Result<&Writing> {
        let Some(writing) = &self.writing else {
            return Err(self.read_only());
        };
        if !self.is_at_home() {
            return Err(Error::CacheForked {
                path: self.path.clone(),
                opened_by: self.process_id,
            });
        }
        Ok(writing)
    }

    fn read_only(&self) -> Error {
        Error::CacheReadOnly {
            path: self.path.clone(),
        }
    }

    fn is_at_home(&self) -> bool {
        std::process::id() == self.process_id
    }
}

impl Drop for TeacherCache {
    fn drop(&mut self) {
        if self.is_at_home() {
            self.close();
        } else {
            std::mem::forget(self.writing.take());
        }
    }
}
