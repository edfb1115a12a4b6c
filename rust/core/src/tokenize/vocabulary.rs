//! The tokens of a tokenizer file, by name and by id.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use tokenizers::vocab::bucket_added_vocabulary::AddedVocabulary;

use super::stand_ins::StandIns;

/// The tokens of a tokenizer file, spelled and numbered as in the file.
///
/// Read from the file because the tokenizer cannot be asked: it keeps the bytes a token stands for, not
/// the token.
pub(super) struct Vocabulary {
    id_of_token: HashMap<String, u32>,
    is_known: Vec<bool>,
    /// Ids of byte tokens, `<0x0A>` for instance, where the decoder reads them as bytes.
    byte_ids: HashSet<u32>,
}

impl Vocabulary {
    /// Reads a canonical `tokenizer.json` that the tokenizer with these added tokens and stand-ins was
    /// built from; so what is malformed in it was refused before.
    pub(super) fn from_config(
        config: &Value,
        added: &AddedVocabulary,
        stand_ins: &StandIns,
    ) -> Result<Self, String> {
        let of_model = model_tokens(&config["model"]["vocab"]);
        let of_added = config["added_tokens"].as_array().into_iter().flatten();
        let of_added = of_added.filter_map(|entry| {
            let token = entry["content"].as_str()?;
            // The id in the file is a wish: a token of the model keeps its id, and gaps are closed. Only
            // a token that was normalized is not found under its name.
            let id = added
                .token_to_id(token)
                .or_else(|| Some(stand_ins.tokenizer_id(id_of(&entry["id"])?)));
            Some((token, id?))
        });

        let mut id_of_token = HashMap::new();
        for (token, tokenizer_id) in of_model.into_iter().chain(of_added) {
            let Some(id) = stand_ins.file_id(tokenizer_id) else {
                continue;
            };
            if i32::try_from(id).is_err() {
                return Err(format!(
                    "token {token:?} has the id {id}, the limit is {}",
                    i32::MAX
                ));
            }
            id_of_token.entry(token.to_owned()).or_insert(id);
        }
        Ok(Self::new(
            id_of_token,
            has_byte_fallback(&config["decoder"]),
        ))
    }

    fn new(id_of_token: HashMap<String, u32>, has_byte_fallback: bool) -> Self {
        let num_ids = id_of_token.values().max().map_or(0, |&id| id as usize + 1);
        let mut is_known = vec![false; num_ids];
        #[expect(clippy::iter_over_hash_type, reason = "the order does not matter")]
        for &id in id_of_token.values() {
            is_known[id as usize] = true;
        }
        let byte_tokens = (0..=u8::MAX).filter(|_| has_byte_fallback);
        let byte_ids = byte_tokens
            .flat_map(|byte| [format!("<0x{byte:02X}>"), format!("<0x{byte:02x}>")])
            .filter_map(|token| id_of_token.get(&token).copied())
            .collect();
        Self {
            id_of_token,
            is_known,
            byte_ids,
        }
    }

    pub(super) fn is_byte(&self, id: u32) -> bool {
        self.byte_ids.contains(&id)
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.id_of_token.get(token).copied()
    }

    pub(super) fn contains(&self, id: u32) -> bool {
        self.is_known.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn len(&self) -> usize {
        self.id_of_token.len()
    }
}

fn model_tokens(vocab: &Value) -> Vec<(&str, u32)> {
    match vocab {
        Value::Object(vocab) => vocab
            .iter()
            .filter_map(|(token, id)| Some((token.as_str(), id_of(id)?)))
            .collect(),
        // Unigram: pairs of a token and its score, in the order of the ids.
        Value::Array(vocab) => (0..)
            .zip(vocab)
            .filter_map(|(id, entry)| Some((entry[0].as_str()?, id)))
            .collect(),
        _ => Vec::new(),
    }
}

fn has_byte_fallback(decoder: &Value) -> bool {
    match decoder["type"].as_str() {
        Some("ByteFallback") => true,
        _ => decoder["decoders"]
            .as_array()
            .is_some_and(|decoders| decoders.iter().any(has_byte_fallback)),
    }
}

/// The id that a number of the file stands for.
pub(super) fn id_of(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
