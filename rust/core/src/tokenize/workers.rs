//! Threads that live for one call.
//!
//! A pool would outlive the call, and a process forked from ours (a data loader, a web server) would
//! inherit its locks without its threads and wait for ever. Starting a thread costs some ten
//! microseconds; [`MIN_BYTES_PER_THREAD`] keeps that a small part of its work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Text that one thread encodes in about a third of a millisecond.
const MIN_BYTES_PER_THREAD: usize = 32 * 1024;

/// How long the caller may have to wait until it is asked whether to go on.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

const NUM_THREADS_VARIABLE: &str = "GAD_FAST_NUM_THREADS";

/// The number of threads that `GAD_FAST_NUM_THREADS` asks for, else one for every core at hand.
pub(super) fn num_threads_from_environment() -> Result<usize> {
    match std::env::var_os(NUM_THREADS_VARIABLE) {
        Some(value) => parse_num_threads(&value.to_string_lossy()),
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn parse_num_threads(value: &str) -> Result<usize> {
    value
        .parse()
        .ok()
        .filter(|&num_threads| num_threads > 0)
        .ok_or_else(|| Error::NumThreadsInvalid {
            variable: NUM_THREADS_VARIABLE,
            value: value.to_owned(),
        })
}

/// Consecutive texts of a batch, the work of one thread.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunk<'a> {
    /// Position of the first text in the batch.
    pub(super) first_index: usize,
    pub(super) texts: &'a [&'a str],
}

/// Cuts `texts` into at most `num_threads` chunks of about the same number of bytes.
pub(super) fn split_by_bytes<'a>(texts: &'a [&'a str], num_threads: usize) -> Vec<Chunk<'a>> {
    let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
    let num_chunks = num_threads.min(num_bytes / MIN_BYTES_PER_THREAD).max(1);

    let mut chunks = Vec::with_capacity(num_chunks);
    let mut first_index = 0;
    let mut bytes_seen = 0;
    for (index, text) in texts.iter().enumerate() {
        bytes_seen += text.len();
        let end = index + 1;
        let is_full = bytes_seen >= num_bytes / num_chunks * (chunks.len() + 1);
        let is_last_chunk = chunks.len() + 1 == num_chunks;
        if end == texts.len() || is_full && !is_last_chunk {
            chunks.push(Chunk {
                first_index,
                texts: &texts[first_index..end],
            });
            first_index = end;
        }
    }
    chunks
}

/// `work` of every item, in order; one thread an item, the first of them on the caller's.
///
/// `work` asks the function that it is given whether it should go on; behind it is `should_go_on`, which
/// runs on the caller's thread alone, some twenty times a second.
///
/// A panic of `work` continues on the caller's thread.
pub(super) fn map_on_threads<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T, &mut dyn FnMut() -> bool) -> R + Sync,
    should_go_on: impl FnMut() -> bool,
) -> Vec<R> {
    let work = &work;
    let mut items = items.into_iter();
    let Some(first) = items.next() else {
        return Vec::new();
    };
    let is_stopped = &AtomicBool::new(false);
    let mut watch = Watch::new(should_go_on, is_stopped);
    thread::scope(|scope| {
        let (at_work, all_done) = mpsc::channel::<()>();
        let workers: Vec<_> = items
            .map(|item| {
                let at_work = at_work.clone();
                scope.spawn(move || {
                    let _at_work = at_work;
                    work(item, &mut || !is_stopped.load(Ordering::Relaxed))
                })
            })
            .collect();
        drop(at_work);

        let mut results = vec![work(first, &mut || watch.should_go_on())];
        // Nobody sends: the channel closes when the last worker is done.
        while all_done.recv_timeout(WATCH_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            watch.should_go_on();
        }
        for worker in workers {
            results.push(
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        results
    })
}

/// Asks the caller from time to time, and tells all threads its answer.
struct Watch<'a, F> {
    ask: F,
    last_asked: Instant,
    is_stopped: &'a AtomicBool,
}

impl<'a, F: FnMut() -> bool> Watch<'a, F> {
    fn new(ask: F, is_stopped: &'a AtomicBool) -> Self {
        Self {
            ask,
            last_asked: Instant::now(),
            is_stopped,
        }
    }

    fn should_go_on(&mut self) -> bool {
        if self.last_asked.elapsed() >= WATCH_INTERVAL {
            self.last_asked = Instant::now();
            if !(self.ask)() {
                self.is_stopped.store(true, Ordering::Relaxed);
            }
        }
        !self.is_stopped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_small_batch_stays_on_one_thread() {
        let texts = ["a", "b", "c"];
        assert_eq!(
            split_by_bytes(&texts, 8),
            [Chunk {
                first_index: 0,
                texts: &texts
            }]
        );
    }

    #[test]
    fn chunks_are_consecutive_and_balanced() {
        let long = "x".repeat(MIN_BYTES_PER_THREAD);
        let short = "y".repeat(MIN_BYTES_PER_THREAD / 8);
        let texts: Vec<&str> = (0..97)
            .map(|index| if index % 5 == 0 { &*long } else { &*short })
            .collect();
        let chunks = split_by_bytes(&texts, 3);

        let mut next_index = 0;
        let mut sizes = Vec::new();
        for chunk in &chunks {
            assert_eq!(chunk.first_index, next_index);
            next_index += chunk.texts.len();
            sizes.push(chunk.texts.iter().map(|text| text.len()).sum::<usize>());
        }
        assert_eq!(next_index, texts.len());
        assert_eq!(sizes.len(), 3);
        // A chunk is over its share by one text at most.
        let share = sizes.iter().sum::<usize>() / 3;
        assert!(
            sizes
                .iter()
                .all(|size| size.abs_diff(share) <= 2 * long.len())
        );
    }

    #[test]
    fn a_giant_text_at_either_end_leaves_no_chunk_empty() {
        let giant = "x".repeat(9 * MIN_BYTES_PER_THREAD);
        for texts in [[&*giant, "a", "b"], ["a", "b", &*giant]] {
            let chunks = split_by_bytes(&texts, 4);
            assert!(chunks.iter().all(|chunk| !chunk.texts.is_empty()));
            assert_eq!(
                chunks.iter().map(|chunk| chunk.texts.len()).sum::<usize>(),
                3
            );
        }
    }

    #[test]
    fn results_come_in_the_order_of_the_items() {
        assert_eq!(
            map_on_threads(vec![3, 1, 2], |item, _| item * 10, || true),
            [30, 10, 20]
        );
        assert!(map_on_threads(Vec::<u8>::new(), |item, _| item, || true).is_empty());
    }

    #[test]
    fn all_threads_stop_when_the_caller_says_so() {
        // Without an end of their own, whether the caller's thread is at work or waits.
        for is_caller_at_work in [true, false] {
            let work = |item, should_go_on: &mut dyn FnMut() -> bool| {
                while (is_caller_at_work || item > 0) && should_go_on() {
                    thread::yield_now();
                }
                item
            };
            let mut num_asked = 0;
            let results = map_on_threads(vec![0, 1, 2], work, || {
                num_asked += 1;
                num_asked < 2
            });
            assert_eq!(results, [0, 1, 2]);
            assert_eq!(num_asked, 2);
        }
    }

    #[test]
    fn the_number_of_threads_must_be_a_positive_whole_number() {
        assert_eq!(parse_num_threads("3").unwrap(), 3);
        for value in ["0", "-1", "2.5", "many", ""] {
            let message = parse_num_threads(value).unwrap_err().to_string();
            assert!(
                message.starts_with("GAD_FAST_NUM_THREADS must be"),
                "{message}"
            );
        }
    }
}
