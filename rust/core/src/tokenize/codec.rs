//! Batches of text to packed ids and back.

use std::path::Path;
use std::sync::Arc;

use super::offsets::split_at_offsets;
use super::workers::Chunk;
use super::{DecodeStream, Encoder, HuggingFaceEncoder, TokenBatch, workers};
use crate::error::{Error, Result};

/// Encodes batches of text to packed ids, on all cores where it pays, and decodes them.
///
/// The result never depends on the number of threads.
pub struct TextCodec {
    encoder: Arc<dyn Encoder>,
    num_threads: usize,
}

impl TextCodec {
    /// A codec for the Hugging Face `tokenizer.json` at `path`.
    ///
    /// Takes its number of threads from `GAD_FAST_NUM_THREADS`, read here once so that a mistake in it
    /// shows at the start of a run; else from the cores at hand.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let num_threads = workers::num_threads_from_environment()?;
        let encoder = HuggingFaceEncoder::from_file(path.as_ref())?;
        Ok(Self::new(Box::new(encoder), num_threads))
    }

    /// A codec for a `tokenizer.json` held in memory; threads as for [`from_file`](Self::from_file).
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let num_threads = workers::num_threads_from_environment()?;
        let encoder = HuggingFaceEncoder::from_json(json)?;
        Ok(Self::new(Box::new(encoder), num_threads))
    }

    /// A codec around `encoder` that uses at most `num_threads` threads, and at least one.
    #[must_use]
    pub fn new(encoder: Box<dyn Encoder>, num_threads: usize) -> Self {
        Self {
            encoder: Arc::from(encoder),
            num_threads,
        }
    }

    /// The ids of each text, without special tokens around it; those that stand in a text are
    /// recognised.
    pub fn encode_batch(&self, texts: &[&str]) -> Result<TokenBatch> {
        self.encode_batch_while(texts, || true)
    }

    /// [`encode_batch`](Self::encode_batch), unless `should_go_on` says no.
    ///
    /// It is asked on the caller's thread, some twenty times a second: between two texts, or while the
    /// other threads are at theirs. A text that was begun is finished.
    pub fn encode_batch_while(
        &self,
        texts: &[&str],
        should_go_on: impl FnMut() -> bool,
    ) -> Result<TokenBatch> {
        let chunks = workers::split_by_bytes(texts, self.num_threads);
        let work = |chunk: Chunk<'_>, should_go_on: &mut dyn FnMut() -> bool| {
            self.encode_chunk(&chunk, should_go_on)
        };
        let parts = workers::map_on_threads(chunks, work, should_go_on);

        let mut parts = parts.into_iter();
        let mut batch = match parts.next() {
            Some(first) => first?,
            None => TokenBatch::with_capacity(0, 0),
        };
        for part in parts {
            batch.append(&part?);
        }
        Ok(batch)
    }

    /// The text of each sequence of a packed batch.
    ///
    /// Bytes that are not UTF-8, as of a response cut within a character, become U+FFFD. Ids that stand
    /// for no token are passed over: embedding tables are padded beyond the vocabulary, and a model may
    /// sample what lies there.
    pub fn decode_batch(
        &self,
        ids: &[i32],
        offsets: &[i64],
        skip_special_tokens: bool,
    ) -> Result<Vec<String>> {
        let ids = unsigned(ids)?;
        let malformed = |position, offset| Error::OffsetsMalformed {
            position,
            offset,
            num_ids: ids.len(),
        };
        split_at_offsets(&ids, offsets, malformed)?
            .into_iter()
            .enumerate()
            .map(|(sequence_index, sequence)| {
                self.encoder
                    .decode(&self.tokens_of(sequence), skip_special_tokens)
                    .map_err(|source| Error::Decode {
                        sequence_index,
                        source,
                    })
            })
            .collect()
    }

    /// A stream that decodes one sequence while it grows, up to the first of `stops`.
    pub fn decode_stream(
        &self,
        stops: Vec<String>,
        skip_special_tokens: bool,
    ) -> Result<DecodeStream> {
        DecodeStream::new(Arc::clone(&self.encoder), stops, skip_special_tokens)
    }

    /// The id of a token as the tokenizer file spells it.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.encoder.token_to_id(token)
    }

    /// Number of tokens, added ones included.
    ///
    /// An embedding table may be larger: models pad it, and ids may have gaps.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.encoder.vocab_size()
    }

    fn encode_chunk(
        &self,
        chunk: &Chunk<'_>,
        should_go_on: &mut dyn FnMut() -> bool,
    ) -> Result<TokenBatch> {
        /// Bytes a token, from below for English, so that the ids of most chunks never move.
        const BYTES_PER_TOKEN: usize = 4;

        let Chunk { first_index, texts } = chunk;
        let num_bytes: usize = texts.iter().map(|text| text.len()).sum();
        let mut batch = TokenBatch::with_capacity(texts.len(), num_bytes / BYTES_PER_TOKEN);
        for (index, text) in texts.iter().enumerate() {
            if !should_go_on() {
                return Err(Error::Interrupted);
            }
            self.encoder
                .encode_into(text, &mut batch.ids)
                .map_err(|source| Error::Encode {
                    text_index: first_index + index,
                    source,
                })?;
            batch.end_sequence();
        }
        Ok(batch)
    }

    fn tokens_of(&self, ids: &[u32]) -> Vec<u32> {
        ids.iter()
            .copied()
            .filter(|&id| self.encoder.contains(id))
            .collect()
    }
}

fn unsigned(ids: &[i32]) -> Result<Vec<u32>> {
    ids.iter()
        .enumerate()
        .map(|(position, &id)| u32::try_from(id).map_err(|_| Error::IdNegative { id, position }))
        .collect()
}
