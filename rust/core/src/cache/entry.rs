//! What is asked of a teacher, and what it answered.

use serde_json::Value;

use super::canonical::{parse, to_canonical_json};
use crate::error::{Error, Result};

/// Longer texts are refused: a row must fit in memory several times.
pub(super) const MAX_TEXT_BYTES: usize = 64 << 20;

/// What was asked of a teacher: it decides the [`Key`](super::Key) alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Request {
    pub(super) teacher: String,
    pub(super) messages: String,
    pub(super) sampling: String,
    pub(super) sample_index: u32,
}

impl Request {
    /// The request for response number `sample_index` of `teacher` to a chat.
    ///
    /// `messages` is a JSON array of objects with at least one of them, `sampling` a JSON object; how
    /// they are spelled does not matter.
    pub fn new(teacher: &str, messages: &str, sampling: &str, sample_index: u32) -> Result<Self> {
        check_length("messages", messages)?;
        check_length("sampling", sampling)?;
        let messages = parse("messages", messages)?;
        let sampling = parse("sampling", sampling)?;
        Self::from_values(teacher, &messages, &sampling, sample_index)
    }

    /// As [`new`](Self::new), of JSON that is read already.
    pub fn from_values(
        teacher: &str,
        messages: &Value,
        sampling: &Value,
        sample_index: u32,
    ) -> Result<Self> {
        let messages = canonical_messages(messages)?;
        let sampling = canonical_sampling(sampling)?;
        check_length("teacher", teacher)?;
        check_length("messages", &messages)?;
        check_length("sampling", &sampling)?;
        Ok(Self {
            teacher: teacher.to_owned(),
            messages,
            sampling,
            sample_index,
        })
    }

    /// Name of the teacher.
    #[must_use]
    pub fn teacher(&self) -> &str {
        &self.teacher
    }

    /// The chat, as canonical JSON.
    #[must_use]
    pub fn messages(&self) -> &str {
        &self.messages
    }

    /// The sampling parameters, as canonical JSON.
    #[must_use]
    pub fn sampling(&self) -> &str {
        &self.sampling
    }

    /// Which of the teacher's responses to this chat, from 0.
    #[must_use]
    pub fn sample_index(&self) -> u32 {
        self.sample_index
    }
}

/// What a teacher answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Response {
    /// The response.
    pub text: String,
    /// Why it ended, in the teacher's words.
    pub finish_reason: Option<String>,
    /// Tokens of the prompt, as the teacher counted them.
    pub num_prompt_tokens: Option<i64>,
    /// Tokens of the response, as the teacher counted them.
    pub num_response_tokens: Option<i64>,
    /// What it cost, in the currency of the buyer.
    pub cost: Option<f64>,
    /// When it came, in seconds since 1970 UTC.
    pub created: f64,
    /// Remarks, for example `refusal`.
    pub flags: Vec<String>,
}

impl Response {
    /// Refuses what could not be stored or read back.
    pub(super) fn check(&self) -> Result<()> {
        check_length("text", &self.text)?;
        for (field, value) in [
            ("num_prompt_tokens", self.num_prompt_tokens),
            ("num_response_tokens", self.num_response_tokens),
        ] {
            if let Some(count) = value.filter(|&count| count < 0) {
                return Err(invalid(
                    field,
                    format!("it must be at least 0, got {count}"),
                ));
            }
        }
        for (field, value) in [("cost", self.cost), ("created", Some(self.created))] {
            if let Some(number) = value.filter(|number| !number.is_finite()) {
                return Err(invalid(field, format!("it must be finite, got {number}")));
            }
        }
        Ok(())
    }
}

/// A row of the cache.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEntry {
    /// Number of the row: rows that were stored later have larger ones.
    pub id: i64,
    /// What was asked.
    pub request: Request,
    /// What came.
    pub response: Response,
}

fn canonical_messages(messages: &Value) -> Result<String> {
    match messages.as_array() {
        Some(turns) if !turns.is_empty() && turns.iter().all(Value::is_object) => {
            Ok(to_canonical_json(messages))
        }
        _ => Err(invalid(
            "messages",
            "it must be an array of objects with at least one of them".to_owned(),
        )),
    }
}

fn canonical_sampling(sampling: &Value) -> Result<String> {
    if sampling.is_object() {
        return Ok(to_canonical_json(sampling));
    }
    Err(invalid("sampling", "it must be an object".to_owned()))
}

fn check_length(field: &'static str, text: &str) -> Result<()> {
    if text.len() <= MAX_TEXT_BYTES {
        return Ok(());
    }
    let reason = format!("it has {} bytes, allowed: {MAX_TEXT_BYTES}", text.len());
    Err(invalid(field, reason))
}

fn invalid(field: &'static str, reason: String) -> Error {
    Error::CacheRequestInvalid { field, reason }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_request_is_checked() {
        for (messages, sampling, expected) in [
            ("[]", "{}", "messages "),
            ("{}", "{}", "messages "),
            ("[1]", "{}", "messages "),
            ("[{}", "{}", "messages "),
            ("[{}]", "[]", "sampling "),
            ("[{}]", "1e999", "sampling "),
        ] {
            let error = Request::new("t", messages, sampling, 0).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_response_is_checked() {
        let good = Response::default();
        good.check().unwrap();
        for bad in [
            Response {
                created: f64::NAN,
                ..good.clone()
            },
            Response {
                cost: Some(f64::INFINITY),
                ..good.clone()
            },
            Response {
                num_prompt_tokens: Some(-1),
                ..good.clone()
            },
            Response {
                text: "x".repeat(MAX_TEXT_BYTES + 1),
                ..good.clone()
            },
        ] {
            assert!(bad.check().is_err());
        }
    }
}
