//! Hashes: of a request, by which it is found, and of a row's content, by which damage is found.

use std::fmt;

use super::canonical::push_string;
use super::entry::{Request, Response};

/// Bytes of the hashes that nobody looks up from outside: enough against damage, and to tell chats apart.
pub(super) const SHORT_HASH_BYTES: usize = 16;

/// The version of the keys, which is in each of them.
const KEY_VERSION: i32 = 1;

/// BLAKE3 of the canonical JSON of key version, messages, sample index, sampling and teacher.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub(super) [u8; 32]);

impl Key {
    /// The key of `request`.
    #[must_use]
    pub fn of(request: &Request) -> Self {
        let mut teacher = String::new();
        push_string(&mut teacher, &request.teacher);
        let mut hasher = blake3::Hasher::new();
        // Members in canonical order, from parts that are canonical.
        for part in [
            &format!(r#"{{"format":{KEY_VERSION},"messages":"#),
            &request.messages,
            &format!(r#","sample_index":{},"sampling":"#, request.sample_index),
            &request.sampling,
            r#","teacher":"#,
            &teacher,
            "}",
        ] {
            hasher.update(part.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Key({self})")
    }
}

/// The hash under which a prompt is stored once, whoever answers it.
///
/// Short, since it is on disk twice: chats that share it by accident need some 2^64 of them.
pub(super) fn prompt_hash(messages: &str) -> [u8; SHORT_HASH_BYTES] {
    shorten(blake3::Hasher::new().update(messages.as_bytes()))
}

fn shorten(hasher: &blake3::Hasher) -> [u8; SHORT_HASH_BYTES] {
    let mut hash = [0; SHORT_HASH_BYTES];
    hasher.finalize_xof().fill(&mut hash);
    hash
}

/// Hash of everything in a row that the key does not cover, and of the key.
pub(super) fn content_hash(key: &Key, response: &Response) -> [u8; SHORT_HASH_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&key.0);
    update_text(&mut hasher, Some(&response.text));
    update_text(&mut hasher, response.finish_reason.as_deref());
    for count in [response.num_prompt_tokens, response.num_response_tokens] {
        update_optional(&mut hasher, count.map(i64::to_le_bytes));
    }
    let cost = response.cost.map(|cost| cost.to_bits().to_le_bytes());
    update_optional(&mut hasher, cost);
    hasher.update(&response.created.to_bits().to_le_bytes());
    for flag in &response.flags {
        update_text(&mut hasher, Some(flag));
    }
    shorten(&hasher)
}

/// The length goes in front, so that no two lists of texts have the same bytes.
fn update_text(hasher: &mut blake3::Hasher, text: Option<&str>) {
    update_optional(hasher, text.map(|text| (text.len() as u64).to_le_bytes()));
    hasher.update(text.unwrap_or_default().as_bytes());
}

fn update_optional(hasher: &mut blake3::Hasher, bytes: Option<[u8; 8]>) {
    hasher.update(&[u8::from(bytes.is_some())]);
    hasher.update(&bytes.unwrap_or_default());
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use std::collections::BTreeSet;

    use super::*;

    fn request(teacher: &str, messages: &str, sampling: &str, sample_index: u32) -> Request {
        Request::new(teacher, messages, sampling, sample_index).unwrap()
    }

    #[test]
    fn a_key_never_changes() {
        // A key is on disk for ever: if this fails, the key version must rise.
        let messages = r#"[{"role": "user", "content": "Hi \"é\"\n"}]"#;
        let key = Key::of(&request("gpt", messages, r#"{"temperature": 1.0}"#, 3));
        let canonical = concat!(
            r#"{"format":1,"messages":[{"content":"Hi \"é\"\n","role":"user"}],"#,
            r#""sample_index":3,"sampling":{"temperature":1},"teacher":"gpt"}"#
        );
        assert_eq!(key, Key(*blake3::hash(canonical.as_bytes()).as_bytes()));
        assert_eq!(
            canonical,
            super::super::canonical::to_canonical_json(&serde_json::from_str(canonical).unwrap())
        );
    }

    #[test]
    fn every_part_of_a_request_is_in_its_key() {
        let keys: BTreeSet<_> = [
            request("a", "[{}]", "{}", 0),
            request("b", "[{}]", "{}", 0),
            request("a", "[{},{}]", "{}", 0),
            request("a", "[{}]", r#"{"top_p":0.9}"#, 0),
            request("a", "[{}]", "{}", 1),
        ]
        .iter()
        .map(Key::of)
        .collect();
        assert_eq!(keys.len(), 5);
    }

    #[test]
    fn every_part_of_a_response_is_in_its_hash() {
        let key = Key([7; 32]);
        let base = Response::default();
        let text = |text: &str| Some(text.to_owned());
        let hashes: BTreeSet<_> = [
            base.clone(),
            Response {
                text: "x".into(),
                ..base.clone()
            },
            Response {
                finish_reason: text(""),
                ..base.clone()
            },
            Response {
                finish_reason: text("x"),
                ..base.clone()
            },
            Response {
                num_prompt_tokens: Some(0),
                ..base.clone()
            },
            Response {
                num_response_tokens: Some(0),
                ..base.clone()
            },
            Response {
                cost: Some(0.0),
                ..base.clone()
            },
            Response {
                created: 1.0,
                ..base.clone()
            },
            Response {
                flags: vec![String::new()],
                ..base.clone()
            },
            Response {
                flags: vec!["ab".into()],
                ..base.clone()
            },
            Response {
                flags: vec!["a".into(), "b".into()],
                ..base
            },
        ]
        .iter()
        .map(|response| content_hash(&key, response))
        .collect();
        assert_eq!(hashes.len(), 11);
    }
}
