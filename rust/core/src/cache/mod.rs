//! Teacher responses on disk: bought once, kept for ever.
//!
//! A [`TeacherCache`] is one `SQLite` file. Callers hand rows to the one thread that writes, those in a
//! hurry by way of one that packs; it commits groups of them. A row is acknowledged after its COMMIT, so
//! that what was acknowledged survives a kill. Other processes read at any time.
//!
//! The database is only ever opened by `SQLite`, never by [`std::fs::File`]: closing a file drops all POSIX
//! locks that the process has on it, `SQLite`'s among them.

mod canonical;
mod commit;
mod compression;
mod desk;
mod entry;
mod failure;
mod file_system;
mod fork;
mod key;
mod lock;
mod packing_thread;
mod queue;
mod reader;
mod row;
mod schema;
mod store;
mod training;
mod unpacking;
mod verify;
mod writer;

pub use entry::{Request, Response, StoredEntry};
pub use fork::{after_fork, before_fork};
pub use key::Key;
pub use store::{CacheInfo, Compression, TeacherCache};
pub use verify::Verification;
pub use writer::Receipt;
