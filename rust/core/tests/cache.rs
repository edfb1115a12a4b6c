//! The teacher cache: what it keeps, what it refuses, and that it finds damage.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Barrier};

use gad_fast_core::Error;
use gad_fast_core::cache::{Compression, Request, Response, TeacherCache};
use proptest::prelude::*;
use rusqlite::Connection;
use tempfile::TempDir;

fn request(index: usize) -> Request {
    let messages = format!(r#"[{{"role": "user", "content": "question {index}"}}]"#);
    Request::new("teacher", &messages, r#"{"temperature": 0.7}"#, 0).unwrap()
}

fn response(index: usize) -> Response {
    Response {
        text: format!("Answer {index}: {}", "because it is so, ".repeat(index % 9)),
        finish_reason: Some("stop".to_owned()),
        num_prompt_tokens: Some(3),
        num_response_tokens: None,
        cost: Some(0.25),
        created: 1_700_000_000.5,
        flags: vec!["checked".to_owned()],
    }
}

fn path_in(folder: &TempDir) -> PathBuf {
    folder.path().join("teacher.cache")
}

/// A closed cache with `num_rows` rows.
fn filled(folder: &TempDir, num_rows: usize) -> PathBuf {
    let path = path_in(folder);
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    for index in 0..num_rows {
        assert!(cache.put_and_wait(request(index), response(index)).unwrap());
    }
    path
}

/// Queues every row at once and waits for all.
fn put_all(cache: &TeacherCache, rows: impl Iterator<Item = (Request, Response)>) {
    let (sender, receiver) = sync_channel(100_000);
    let mut num_rows = 0;
    for (request, response) in rows {
        let sender = sender.clone();
        let receipt = Box::new(move |outcome| sender.send(outcome).unwrap());
        cache.put(request, response, receipt).unwrap();
        num_rows += 1;
    }
    for _ in 0..num_rows {
        receiver.recv().unwrap().unwrap();
    }
}

fn no_problems(cache: &TeacherCache) -> u64 {
    let verification = cache.verify(&|| true).unwrap();
    assert_eq!(verification.problems, [""; 0]);
    verification.num_rows
}

#[test]
fn a_row_comes_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    for compression in [Compression::Zstd, Compression::None] {
        let path = folder.path().join(format!("{compression:?}"));
        let cache = TeacherCache::open(&path, compression).unwrap();
        for index in 0..20 {
            assert!(cache.put_and_wait(request(index), response(index)).unwrap());
            assert_eq!(cache.get(&request(index)).unwrap(), Some(response(index)));
        }
        drop(cache);

        let cache = TeacherCache::open_read_only(&path).unwrap();
        assert_eq!(cache.len().unwrap(), 20);
        assert!(cache.contains(&request(19)).unwrap());
        assert!(!cache.contains(&request(20)).unwrap());
        assert_eq!(cache.get(&request(20)).unwrap(), None);
        assert_eq!(no_problems(&cache), 20);
        for (index, entry) in cache.entries_after(0, 100).unwrap().into_iter().enumerate() {
            assert_eq!(
                (entry.request, entry.response),
                (request(index), response(index))
            );
        }
    }
}

#[test]
fn of_equal_requests_the_first_response_stays() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TeacherCache::open(path_in(&folder), Compression::Zstd).unwrap();
    assert!(cache.put_and_wait(request(0), response(0)).unwrap());
    assert!(!cache.put_and_wait(request(0), response(1)).unwrap());
    assert_eq!(cache.get(&request(0)).unwrap(), Some(response(0)));
    assert_eq!(cache.info().unwrap().num_prompts, 1);
}

#[test]
fn iteration_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TeacherCache::open_read_only(filled(&folder, 10)).unwrap();
    let first = cache.entries_after(0, 4).unwrap();
    let rest = cache.entries_after(first[3].id, 100).unwrap();
    let indices: Vec<_> = first
        .iter()
        .chain(&rest)
        .map(|entry| &entry.request)
        .collect();
    assert_eq!(
        indices,
        (0..10)
            .map(request)
            .collect::<Vec<_>>()
            .iter()
            .collect::<Vec<_>>()
    );
}

#[test]
fn many_threads_put_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    let start = Barrier::new(16);
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let (cache, start) = (&cache, &start);
            scope.spawn(move || {
                start.wait();
                for index in 0..20 {
                    let index = 20 * thread + index;
                    assert!(cache.put_and_wait(request(index), response(index)).unwrap());
                    assert!(cache.contains(&request(index)).unwrap());
                }
            });
        }
    });
    assert_eq!(cache.len().unwrap(), 320);
}

#[test]
fn a_dictionary_comes_after_a_thousand_rows_and_old_rows_stay_readable() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    put_all(
        &cache,
        (0..1000).map(|index| (request(index), response(index))),
    );
    // Closing waits for the training.
    drop(cache);

    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    assert!(cache.info().unwrap().has_dictionary);
    put_all(
        &cache,
        (1000..1200).map(|index| (request(index), response(index))),
    );
    assert_eq!(no_problems(&cache), 1200);
    for index in [0, 999, 1000, 1199] {
        assert_eq!(cache.get(&request(index)).unwrap(), Some(response(index)));
    }
    drop(cache);
    let with_dictionary: u64 = Connection::open(&path)
        .unwrap()
        .query_row(
            "SELECT COUNT(*) FROM responses WHERE compression = 1",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert!(with_dictionary > 150, "{with_dictionary}");
}

#[test]
fn a_second_writer_is_refused_and_a_reader_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    let error = TeacherCache::open(&path, Compression::Zstd).err().unwrap();
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    let reader = TeacherCache::open_read_only(&path).unwrap();
    cache.put_and_wait(request(0), response(0)).unwrap();
    assert_eq!(reader.len().unwrap(), 1);
    assert!(matches!(
        reader.put_and_wait(request(1), response(1)),
        Err(Error::CacheReadOnly { .. })
    ));
    cache.close();
    assert!(matches!(
        cache.put_and_wait(request(1), response(1)),
        Err(Error::CacheClosed { .. })
    ));
    TeacherCache::open(&path, Compression::Zstd).unwrap();
}

#[test]
fn what_is_no_cache_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "remember the milk ".repeat(1000)).unwrap();
    let other = folder.path().join("other.db");
    Connection::open(&other)
        .unwrap()
        .execute_batch("CREATE TABLE a (b)")
        .unwrap();
    let newer = filled(&folder, 1);
    Connection::open(&newer)
        .unwrap()
        .pragma_update(None, "user_version", 3)
        .unwrap();

    for (path, expected) in [
        (&text, "no teacher cache"),
        (&other, "no teacher cache"),
        (&newer, "format 3"),
    ] {
        let before = std::fs::read(path).unwrap();
        for error in [
            TeacherCache::open(path, Compression::Zstd).err().unwrap(),
            TeacherCache::open_read_only(path).err().unwrap(),
        ] {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
        assert_eq!(std::fs::read(path).unwrap(), before);
    }
    for path in [folder.path().join("none/cache"), folder.path().to_owned()] {
        let error = TeacherCache::open(&path, Compression::Zstd).err().unwrap();
        assert!(
            matches!(
                error,
                Error::CacheUnopenable { .. } | Error::CacheNotACache { .. }
            ),
            "{error}"
        );
    }
    let error = TeacherCache::open_read_only(folder.path().join("none"))
        .err()
        .unwrap();
    assert!(matches!(error, Error::CacheUnopenable { .. }), "{error}");
}

/// What earlier versions made.
const FIRST_LAYOUT: &str = "
PRAGMA application_id = 0x67616463;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
CREATE TABLE dictionaries (id INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE teachers (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, sampling TEXT NOT NULL, UNIQUE (name, sampling)
) STRICT;
CREATE TABLE prompts (
    id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, compression INTEGER, data ANY NOT NULL
) STRICT;
CREATE TABLE responses (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, teacher_id INTEGER NOT NULL REFERENCES teachers,
    prompt_id INTEGER NOT NULL REFERENCES prompts, sample_index INTEGER NOT NULL, finish_reason TEXT,
    num_prompt_tokens INTEGER, num_response_tokens INTEGER, cost REAL, created REAL NOT NULL, flags TEXT,
    hash BLOB NOT NULL, compression INTEGER, data ANY NOT NULL
) STRICT;
";

#[test]
fn a_cache_of_the_first_layout_is_read_and_written_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    Connection::open(&path)
        .unwrap()
        .execute_batch(FIRST_LAYOUT)
        .unwrap();
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    for expected in [true, false] {
        for index in 0..20 {
            let is_new = cache.put_and_wait(request(index), response(index)).unwrap();
            assert_eq!(is_new, expected);
        }
    }
    drop(cache);
    let cache = TeacherCache::open_read_only(&path).unwrap();
    assert_eq!(cache.info().unwrap().format_version, 1);
    for index in 0..20 {
        assert_eq!(cache.get(&request(index)).unwrap(), Some(response(index)));
    }
    assert!(!cache.contains(&request(20)).unwrap());
    assert_eq!(cache.verify(&|| true).unwrap().problems, [""; 0]);
}

#[test]
fn a_new_cache_tells_its_layout_and_keeps_teachers_and_samples_of_a_prompt_apart() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TeacherCache::open(path_in(&folder), Compression::Zstd).unwrap();
    assert_eq!(cache.info().unwrap().format_version, 2);
    let messages = r#"[{"role": "user", "content": "one question"}]"#;
    let mut requests = Vec::new();
    for teacher in ["a", "b"] {
        for sampling in ["{}", r#"{"temperature": 0.5}"#] {
            for sample_index in 0..3 {
                requests.push(Request::new(teacher, messages, sampling, sample_index).unwrap());
            }
        }
    }
    for (index, request) in requests.iter().enumerate() {
        assert!(!cache.contains(request).unwrap());
        assert!(
            cache
                .put_and_wait(request.clone(), response(index))
                .unwrap()
        );
    }
    assert_eq!(cache.info().unwrap().num_prompts, 1);
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(cache.get(request).unwrap(), Some(response(index)));
        assert!(!cache.put_and_wait(request.clone(), response(99)).unwrap());
    }
}

/// Changes a cache behind its back and gives what `verify` and `get` of row 1 say.
fn after_damage(statement: &str) -> (Vec<String>, Option<Error>) {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(&folder, 5);
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch("PRAGMA foreign_keys = OFF")
        .unwrap();
    connection.execute_batch(statement).unwrap();
    drop(connection);
    let cache = TeacherCache::open_read_only(&path).unwrap();
    let problems = cache.verify(&|| true).unwrap().problems;
    (problems, cache.get(&request(1)).err())
}

#[test]
fn damage_is_found_and_named() {
    for (statement, row) in [
        (
            "UPDATE responses SET data = 'other', compression = NULL WHERE id = 2",
            true,
        ),
        (
            "UPDATE responses SET data = x'28b52ffd', compression = 0 WHERE id = 2",
            true,
        ),
        ("UPDATE responses SET compression = 7 WHERE id = 2", true),
        (
            "UPDATE responses SET data = 5, compression = NULL WHERE id = 2",
            true,
        ),
        (
            "UPDATE responses SET data = CAST(x'ff' AS TEXT), compression = NULL WHERE id = 2",
            true,
        ),
        ("UPDATE responses SET cost = 9 WHERE id = 2", true),
        ("UPDATE responses SET flags = '[' WHERE id = 2", true),
        ("UPDATE responses SET hash = x'00' WHERE id = 2", true),
        (
            "UPDATE responses SET finish_reason = NULL WHERE id = 2",
            true,
        ),
        ("UPDATE responses SET key = x'00' WHERE id = 2", false),
        ("UPDATE responses SET sample_index = 1 WHERE id = 2", false),
        ("UPDATE responses SET sample_index = -1 WHERE id = 2", false),
        (
            "UPDATE responses SET prompt_id = 4, sample_index = 7 WHERE id = 2",
            false,
        ),
        ("UPDATE responses SET teacher_id = 77 WHERE id = 2", false),
        ("UPDATE teachers SET name = 'x'", false),
        ("DELETE FROM prompts WHERE id = 2", false),
        (
            "UPDATE prompts SET data = '[]', compression = NULL WHERE id = 2",
            false,
        ),
    ] {
        let (problems, error) = after_damage(statement);
        assert!(
            problems.iter().any(|line| line.starts_with("row 2: ")),
            "{statement}: {problems:?}"
        );
        if row {
            let message = error.unwrap().to_string();
            assert!(message.contains("row 2"), "{statement}: {message}");
        }
    }
}

#[test]
fn flipped_pages_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = filled(&folder, 200);
    let good = std::fs::read(&path).unwrap();
    let mut num_found = 0;
    for page in 1..good.len() / 8192 {
        let mut bytes = good.clone();
        bytes[page * 8192..page * 8192 + 4096].fill(0xa5);
        std::fs::write(&path, &bytes).unwrap();
        // An error or a list of problems, never a panic and never a clean bill.
        let clean = TeacherCache::open_read_only(&path)
            .and_then(|cache| cache.verify(&|| true))
            .is_ok_and(|verification| verification.problems.is_empty());
        num_found += usize::from(!clean);
    }
    assert_eq!(num_found, good.len() / 8192 - 1);
}

#[test]
fn plain_rows_are_readable_by_any_tool() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    let cache = TeacherCache::open(&path, Compression::None).unwrap();
    cache.put_and_wait(request(0), response(8)).unwrap();
    let text: String = Connection::open(&path)
        .unwrap()
        .query_row("SELECT data FROM responses", [], |row| row.get(0))
        .unwrap();
    assert_eq!(text, response(8).text);
}

#[test]
fn what_cannot_be_stored_is_refused_before_it_is_queued() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TeacherCache::open(path_in(&folder), Compression::Zstd).unwrap();
    let bad = Response {
        cost: Some(f64::NAN),
        ..response(0)
    };
    assert!(matches!(
        cache.put_and_wait(request(0), bad),
        Err(Error::CacheRequestInvalid { field: "cost", .. })
    ));
    assert!(cache.is_empty().unwrap());
}

/// A step of the model check.
#[derive(Debug, Clone)]
enum Step {
    Put { request: usize, response: usize },
    PutMany { first: usize, count: usize },
    Get { request: usize },
    Reopen { is_plain: bool },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..12_usize, 0..40_usize).prop_map(|(request, response)| Step::Put { request, response }),
        1 => (0..12_usize, 1..8_usize).prop_map(|(first, count)| Step::PutMany { first, count }),
        2 => (0..16_usize).prop_map(|request| Step::Get { request }),
        1 => any::<bool>().prop_map(|is_plain| Step::Reopen { is_plain }),
    ];
    prop::collection::vec(step, 1..40)
}

fn open(path: &Path, is_plain: bool) -> TeacherCache {
    let compression = if is_plain {
        Compression::None
    } else {
        Compression::Zstd
    };
    TeacherCache::open(path, compression).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_behaves_as_a_hash_map_that_keeps_the_first(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let path = path_in(&folder);
        let mut cache = open(&path, false);
        let mut model: HashMap<usize, usize> = HashMap::new();
        let mut order = Vec::new();
        for step in steps {
            match step {
                Step::Put { request: asked, response: answer } => {
                    let is_new = cache.put_and_wait(request(asked), response(answer)).unwrap();
                    prop_assert_eq!(is_new, !model.contains_key(&asked));
                    if is_new { model.insert(asked, answer); order.push(asked); }
                }
                Step::PutMany { first, count } => {
                    put_all(&cache, (first..first + count).map(|i| (request(i), response(i))));
                    for index in first..first + count {
                        if let std::collections::hash_map::Entry::Vacant(slot) = model.entry(index) {
                            slot.insert(index);
                            order.push(index);
                        }
                    }
                }
                Step::Get { request: asked } => {
                    let expected = model.get(&asked).map(|&answer| response(answer));
                    prop_assert_eq!(cache.contains(&request(asked)).unwrap(), expected.is_some());
                    prop_assert_eq!(cache.get(&request(asked)).unwrap(), expected);
                }
                Step::Reopen { is_plain } => {
                    drop(cache);
                    cache = open(&path, is_plain);
                }
            }
        }
        prop_assert_eq!(cache.len().unwrap(), model.len() as u64);
        prop_assert_eq!(no_problems(&cache), model.len() as u64);
        let stored: Vec<_> = cache.entries_after(0, 100).unwrap();
        for (entry, asked) in stored.iter().zip(&order) {
            prop_assert_eq!(&entry.request, &request(*asked));
            prop_assert_eq!(&entry.response, &response(model[asked]));
        }
    }
}

#[test]
fn a_receipt_is_called_when_the_cache_closes() {
    let folder = tempfile::tempdir().unwrap();
    let cache = TeacherCache::open(path_in(&folder), Compression::Zstd).unwrap();
    let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for index in 0..500 {
        let count = Arc::clone(&count);
        let receipt = Box::new(move |outcome: gad_fast_core::Result<bool>| {
            assert!(outcome.unwrap());
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        cache.put(request(index), response(index), receipt).unwrap();
    }
    cache.close();
    assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 500);
}

/// Bytes of a frame in the write-ahead log: its header and a page.
const FRAME_BYTES: usize = 24 + 8192;

/// A copy of a cache whose writer was killed, with its log changed.
fn open_copy(database: &[u8], log: &[u8]) -> (TempDir, TeacherCache) {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    std::fs::write(&path, database).unwrap();
    std::fs::write(folder.path().join("teacher.cache-wal"), log).unwrap();
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    (folder, cache)
}

#[test]
fn a_log_torn_in_its_last_frame_loses_the_last_commit_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = path_in(&folder);
    let cache = TeacherCache::open(&path, Compression::Zstd).unwrap();
    for index in 0..20 {
        cache.put_and_wait(request(index), response(index)).unwrap();
    }
    let database = std::fs::read(&path).unwrap();
    let log = std::fs::read(folder.path().join("teacher.cache-wal")).unwrap();
    drop(cache);
    assert_eq!((log.len() - 32) % FRAME_BYTES, 0);

    // Every byte of the header and around the ends of the page, and a sample between.
    let cuts =
        (1..=FRAME_BYTES).filter(|cut| !(48..=FRAME_BYTES - 48).contains(cut) || cut % 61 == 0);
    for cut in cuts {
        let (_folder, cache) = open_copy(&database, &log[..log.len() - cut]);
        assert_eq!(no_problems(&cache), 19, "cut {cut}");
        for index in 0..19 {
            assert_eq!(cache.get(&request(index)).unwrap(), Some(response(index)));
        }
        assert!(cache.put_and_wait(request(19), response(19)).unwrap());
    }
    for flipped in (1..=FRAME_BYTES).step_by(499) {
        let mut log = log.clone();
        let position = log.len() - flipped;
        log[position] ^= 0x10;
        let (_folder, cache) = open_copy(&database, &log);
        assert_eq!(no_problems(&cache), 19, "flipped {flipped}");
    }
    let (_folder, cache) = open_copy(&database, &log);
    assert_eq!(no_problems(&cache), 20);
}
