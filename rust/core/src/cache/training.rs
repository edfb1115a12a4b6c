//! A zstd dictionary from the rows that are there, trained beside the writing.

use std::path::PathBuf;
use std::thread::JoinHandle;

use super::fork;
use super::reader::Reader;

/// Rows to learn from: five times as many save 2 % of what follows, but come too late for the rows before
/// them, and take five times as long to learn from.
pub(super) const NUM_TRAINING_ROWS: usize = 1000;

/// zstd's own advice: about a hundredth of what it is trained on.
const MAX_DICTIONARY_BYTES: usize = 110 << 10;

/// Of each text, a dictionary learns nothing more from the rest.
const MAX_SAMPLE_BYTES: usize = 16 << 10;

/// A training under way.
pub(super) struct Training {
    thread: JoinHandle<Option<Vec<u8>>>,
}

impl Training {
    /// Starts on the first rows of the cache at `path`; None if the system gives no thread.
    pub(super) fn start(path: PathBuf) -> Option<Self> {
        let thread = std::thread::Builder::new()
            .name("gad-fast-dictionary".to_owned())
            .spawn(move || train(&read_samples(path)?))
            .ok()?;
        Some(Self { thread })
    }

    pub(super) fn is_done(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the dictionary; None if the texts are too few or too much alike for one.
    pub(super) fn finish(self) -> Option<Vec<u8>> {
        self.thread.join().ok().flatten()
    }
}

fn read_samples(path: PathBuf) -> Option<Vec<String>> {
    let reader = Reader::new(path);
    let mut samples = Vec::new();
    let mut last_id = 0;
    while samples.len() < 2 * NUM_TRAINING_ROWS {
        let inside = fork::enter();
        let entries = reader.entries_after(last_id, 256).ok()?;
        drop(inside);
        let Some(last) = entries.last() else { break };
        last_id = last.id;
        for entry in entries {
            samples.push(entry.request.messages);
            samples.push(entry.response.text);
        }
    }
    Some(samples)
}

fn train(samples: &[String]) -> Option<Vec<u8>> {
    let samples: Vec<&[u8]> = samples
        .iter()
        .map(|sample| &sample.as_bytes()[..sample.len().min(MAX_SAMPLE_BYTES)])
        .filter(|sample| !sample.is_empty())
        .collect();
    let num_bytes: usize = samples.iter().map(|sample| sample.len()).sum();
    let dictionary =
        zstd::dict::from_samples(&samples, MAX_DICTIONARY_BYTES.min(num_bytes / 8)).ok()?;
    (!dictionary.is_empty()).then_some(dictionary)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::cache::compression::Packer;

    #[test]
    fn a_dictionary_shrinks_short_texts_of_its_kind() {
        let text = |index: usize| {
            format!(
                "Question {index}: why does water number {} boil at {} degrees?",
                index * 7,
                index % 90
            )
        };
        let samples: Vec<String> = (0..3000).map(text).collect();
        let dictionary = train(&samples).unwrap();
        let new = text(12_345);
        let before = Packer::zstd(None).pack(&new).data.len();
        let after = Packer::zstd(Some((1, dictionary))).pack(&new).data.len();
        assert!(3 * after < 2 * before, "{after} bytes, {before} without");
    }

    #[test]
    fn too_little_text_gives_no_dictionary() {
        assert_eq!(train(&[]), None);
        assert_eq!(train(&["a".to_owned()]), None);
    }
}
