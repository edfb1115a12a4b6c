//! Byte-level vocabularies that lack some bytes.
//!
//! A byte that was not in the training text may have no token; `SmolLM2` lacks eight. Versions of
//! `tokenizers` before 1.0 encode such a byte as the unknown token, or as nothing where there is none;
//! version 1.0 refuses the file (issue 2447 of huggingface/tokenizers). So a missing byte is given a
//! stand-in token. No merge knows it, therefore it comes out of the tokenizer as it went in, and is
//! replaced there by what the older versions give.
//!
//! Only two things differ, both in texts that cannot come back from their ids anyway: the older versions
//! do not fuse unknown tokens across the border of two pre-tokens; and without an unknown token, they may
//! merge what stands on both sides of a missing byte.

use std::ops::Range;

use serde_json::Value;
use tokenizers::utils::byte_level::BYTES_CHAR_LOOKUP;

use super::vocabulary::id_of;

/// The stand-ins of a tokenizer, and with them the difference between its ids and those of its file.
#[derive(Debug, Default)]
pub(super) struct StandIns {
    /// Ids of the stand-ins: those after the model's own. The tokenizer numbers added tokens that are
    /// not in the model from there on, so these are shifted by the number of stand-ins.
    ids: Range<u32>,
    /// What a missing byte becomes.
    unknown_id: Option<u32>,
    /// Whether a run of missing bytes becomes one unknown token.
    is_run_fused: bool,
}

impl StandIns {
    /// Gives a stand-in to each byte that can be in a text and has no token in `model`, the model of a
    /// canonical `tokenizer.json`.
    ///
    /// Leaves models alone that are not byte-level, lack nothing, or have gaps in their ids, where a
    /// stand-in could take the id of another token.
    pub(super) fn insert_into(model: &mut Value) -> Self {
        if model["byte_level"] != true {
            return Self::default();
        }
        let unknown_token = model["unk_token"].as_str().map(str::to_owned);
        let is_run_fused = model["fuse_unk"] == true;
        let Some(vocab) = model["vocab"].as_object_mut() else {
            return Self::default();
        };
        let unknown_id = unknown_token.and_then(|token| id_of(vocab.get(&token)?));
        let Ok(first_id) = u32::try_from(vocab.len()) else {
            return Self::default();
        };
        if !vocab
            .values()
            .all(|id| id_of(id).is_some_and(|id| id < first_id))
        {
            return Self::default();
        }

        let mut ids = first_id..first_id;
        for byte in (0..=u8::MAX).filter(|&byte| is_in_utf8(byte)) {
            let symbol = BYTES_CHAR_LOOKUP[usize::from(byte)].to_string();
            vocab.entry(symbol).or_insert_with(|| {
                ids.end += 1;
                Value::from(ids.end - 1)
            });
        }
        Self {
            ids,
            unknown_id,
            is_run_fused,
        }
    }

    /// The id in the file of the token with this id in the tokenizer; none for a stand-in.
    pub(super) fn file_id(&self, tokenizer_id: u32) -> Option<u32> {
        if self.ids.contains(&tokenizer_id) {
            None
        } else if tokenizer_id < self.ids.start {
            Some(tokenizer_id)
        } else {
            Some(tokenizer_id - self.num_stand_ins())
        }
    }

    /// The inverse of [`file_id`](Self::file_id).
    pub(super) fn tokenizer_id(&self, file_id: u32) -> u32 {
        if file_id < self.ids.start {
            file_id
        } else {
            file_id + self.num_stand_ins()
        }
    }

    /// Appends the ids in the file of what the tokenizer made of one text.
    pub(super) fn append_file_ids(
        &self,
        tokenizer_ids: impl Iterator<Item = u32>,
        ids: &mut Vec<i32>,
    ) {
        let mut is_in_run = false;
        for tokenizer_id in tokenizer_ids {
            let file_id = self.file_id(tokenizer_id);
            if file_id.is_some() {
                is_in_run = false;
            } else if is_in_run && self.is_run_fused {
                continue;
            } else {
                is_in_run = true;
            }
            // `Vocabulary` admits no id past `i32::MAX`.
            ids.extend(file_id.or(self.unknown_id).map(u32::cast_signed));
        }
    }

    fn num_stand_ins(&self) -> u32 {
        self.ids.end - self.ids.start
    }
}

/// Whether `byte` occurs in any UTF-8 text.
fn is_in_utf8(byte: u8) -> bool {
    !matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}
