//! The seam between the codec and a tokenizer library.

use crate::error::EncoderError;

/// A tokenizer as the codec sees it: one text in, its ids out, and back.
///
/// It is the seam at which another tokenizer library, or a fake in a test, takes the place of
/// [`HuggingFaceEncoder`](super::HuggingFaceEncoder).
pub trait Encoder: Send + Sync {
    /// Appends the ids of `text` to `ids`.
    ///
    /// Adds no special tokens around the text, but recognises the ones which stand in it.
    fn encode_into(&self, text: &str, ids: &mut Vec<i32>) -> std::result::Result<(), EncoderError>;

    /// The text of `ids`, all of which are known to [`contains`](Self::contains).
    fn decode(
        &self,
        ids: &[u32],
        skip_special_tokens: bool,
    ) -> std::result::Result<String, EncoderError>;

    /// The id of a token as the tokenizer file spells it.
    fn token_to_id(&self, token: &str) -> Option<u32>;

    /// Whether `id` stands for a token.
    fn contains(&self, id: u32) -> bool;

    /// Whether the text of `id` may change with the ids after it although it does not end in U+FFFD.
    ///
    /// So it is with the byte tokens of a decoder that judges whole runs of them: one byte too many, and
    /// none of the run is text.
    fn is_byte(&self, _id: u32) -> bool {
        false
    }

    /// Number of tokens, added ones included.
    fn vocab_size(&self) -> usize;
}
