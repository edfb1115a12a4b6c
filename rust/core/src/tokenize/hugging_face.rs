//! The crate `tokenizers` as an [`Encoder`].

use std::path::Path;

use serde_json::Value;
use tokenizers::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};

use super::Encoder;
use super::stand_ins::StandIns;
use super::vocabulary::Vocabulary;
use crate::error::{EncoderError, Error, Result};

/// A tokenizer read from a Hugging Face `tokenizer.json`.
pub struct HuggingFaceEncoder {
    tokenizer: PipelineTokenizer,
    vocabulary: Vocabulary,
    stand_ins: StandIns,
    options: EncodeOptions,
}

impl HuggingFaceEncoder {
    /// Reads the `tokenizer.json` at `path`.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|source| Error::TokenizerUnreadable {
            path: path.to_owned(),
            source,
        })?;
        Self::from_json(&json)
    }

    /// Reads a `tokenizer.json` held in memory, of this or an older format.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let mut config: Value = serde_json::from_slice(json).map_err(not_understood)?;
        tokenizers::canonicalize_value(&mut config).map_err(not_understood)?;
        let stand_ins = StandIns::insert_into(&mut config["model"]);
        let tokenizer = tokenizers::from_json(&config.to_string()).map_err(not_understood)?;
        let vocabulary =
            Vocabulary::from_config(&config, tokenizer.get_added_vocabulary(), &stand_ins)
                .map_err(not_understood)?;
        Ok(Self {
            tokenizer,
            vocabulary,
            stand_ins,
            options: EncodeOptions {
                add_special_tokens: false,
                encode_special_tokens: false,
                // Some files carry the padding and truncation of the run that saved them. Lengths are
                // the caller's business: a text must never be cut without a word.
                padding: Override::Off,
                truncation: Override::Off,
            },
        })
    }
}

impl Encoder for HuggingFaceEncoder {
    fn encode_into(&self, text: &str, ids: &mut Vec<i32>) -> std::result::Result<(), EncoderError> {
        let mut tokens = Vec::new();
        self.tokenizer
            .encode_into(text, &self.options, &mut tokens)?;
        self.stand_ins
            .append_file_ids(tokens.into_iter().map(PipelineToken::id), ids);
        Ok(())
    }

    fn decode(
        &self,
        ids: &[u32],
        skip_special_tokens: bool,
    ) -> std::result::Result<String, EncoderError> {
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| self.stand_ins.tokenizer_id(id))
            .collect();
        self.tokenizer.decode(&ids, skip_special_tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocabulary.token_to_id(token)
    }

    fn contains(&self, id: u32) -> bool {
        self.vocabulary.contains(id)
    }

    fn is_byte(&self, id: u32) -> bool {
        self.vocabulary.is_byte(id)
    }

    fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it is an argument of map_err"
)]
fn not_understood(reason: impl ToString) -> Error {
    Error::TokenizerNotUnderstood {
        reason: reason.to_string(),
    }
}
