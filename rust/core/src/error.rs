//! Every way the core can fail.
//!
//! A message says what is wrong with the value, the bound, and the way out, in that order.

use std::path::PathBuf;

/// What an operation of the core gives.
pub type Result<T> = std::result::Result<T, Error>;

/// The error of an [`Encoder`](crate::tokenize::Encoder), which does not know where its text came from.
pub type EncoderError = Box<dyn std::error::Error + Send + Sync>;

/// Every way the core can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system does not give us the tokenizer file.
    #[error("cannot read the tokenizer file {}: {source}", path.display())]
    TokenizerUnreadable {
        /// The file that was asked for.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// The tokenizer file is not JSON, or describes a tokenizer that cannot be built.
    #[error(
        "not a usable tokenizer: {reason} (expected a `tokenizer.json` as `save_pretrained` of transformers writes it)"
    )]
    TokenizerNotUnderstood {
        /// What the reader of the file objects to.
        reason: String,
    },

    /// The tokenizer refuses a text, for example one without an unknown token to fall back to.
    #[error("text {text_index} cannot be encoded: {source}")]
    Encode {
        /// Position of the text in its batch.
        text_index: usize,
        /// What the tokenizer said.
        source: EncoderError,
    },

    /// The tokenizer refuses a sequence of ids which are all in its vocabulary.
    #[error("sequence {sequence_index} cannot be decoded: {source}")]
    Decode {
        /// Position of the sequence in its batch.
        sequence_index: usize,
        /// What the tokenizer said.
        source: EncoderError,
    },

    /// An id below 0.
    #[error(
        "ids must be at least 0, got {id} at position {position} (drop padding before decoding)"
    )]
    IdNegative {
        /// The id.
        id: i32,
        /// Where it stands in the packed ids.
        position: usize,
    },

    /// Offsets without even the first boundary.
    #[error("offsets must hold at least the 0 in front of the first sequence, got none")]
    OffsetsEmpty,

    /// Offsets that do not cut the ids into consecutive sequences.
    #[error(
        "offsets[{position}] is {offset}, but offsets must start at 0, never fall and end at the number of ids, {num_ids}"
    )]
    OffsetsMalformed {
        /// Which boundary is wrong.
        position: usize,
        /// Its value.
        offset: i64,
        /// Number of ids to cut.
        num_ids: usize,
    },

    /// A micro-batch that could hold no token.
    #[error(
        "token_budget must be at least 1, got {token_budget} (set it to what one forward pass can hold)"
    )]
    TokenBudgetTooSmall {
        /// The budget that was asked for.
        token_budget: i64,
    },

    /// The environment asks for a number of threads which is none.
    #[error(
        "{variable} must be a whole number of at least 1, got {value:?} (unset it to use every core)"
    )]
    NumThreadsInvalid {
        /// Name of the environment variable.
        variable: &'static str,
        /// What it is set to.
        value: String,
    },
}
