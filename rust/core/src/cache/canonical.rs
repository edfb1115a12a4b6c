//! One spelling for JSON values that mean the same.
//!
//! As RFC 8785, with keys in the order of their code points: sorted keys, no white space, shortest
//! escapes, characters as they are (NFC and NFD stay different). A float without a fraction is written as
//! the integer it is, so that a temperature of 1 and of 1.0 are the same request; other floats are the
//! shortest digits that read as the same number.

use std::fmt::Write as _;

use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// Whole floats up to here are exact.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// A JSON value read from `text`; `field` is what the error calls it.
pub(super) fn parse(field: &'static str, text: &str) -> Result<Value> {
    // The reader stops at a depth of 128, which bounds the recursion below.
    serde_json::from_str(text).map_err(|source| Error::CacheRequestInvalid {
        field,
        reason: format!("it is no JSON: {source}"),
    })
}

/// The canonical spelling of `value`.
pub(super) fn to_canonical_json(value: &Value) -> String {
    let mut text = String::new();
    push_value(&mut text, value);
    text
}

/// `value` as a JSON string.
pub(super) fn push_string(text: &mut String, value: &str) {
    text.push('"');
    let mut start = 0;
    for (position, byte) in value.bytes().enumerate() {
        if byte < 0x20 || byte == b'"' || byte == b'\\' {
            text.push_str(&value[start..position]);
            push_escape(text, byte);
            start = position + 1;
        }
    }
    text.push_str(&value[start..]);
    text.push('"');
}

fn push_escape(text: &mut String, byte: u8) {
    match byte {
        b'"' => text.push_str("\\\""),
        b'\\' => text.push_str("\\\\"),
        b'\n' => text.push_str("\\n"),
        b'\r' => text.push_str("\\r"),
        b'\t' => text.push_str("\\t"),
        0x08 => text.push_str("\\b"),
        0x0c => text.push_str("\\f"),
        // Writing to a String cannot fail.
        byte => drop(write!(text, "\\u{byte:04x}")),
    }
}

fn push_value(text: &mut String, value: &Value) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(true) => text.push_str("true"),
        Value::Bool(false) => text.push_str("false"),
        Value::Number(number) => push_number(text, number),
        Value::String(string) => push_string(text, string),
        Value::Array(items) => push_array(text, items),
        Value::Object(map) => push_object(text, map),
    }
}

fn push_array(text: &mut String, items: &[Value]) {
    text.push('[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        push_value(text, item);
    }
    text.push(']');
}

fn push_object(text: &mut String, map: &Map<String, Value>) {
    let mut members: Vec<_> = map.iter().collect();
    members.sort_unstable_by_key(|(name, _)| *name);
    text.push('{');
    for (index, (name, value)) in members.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        push_string(text, name);
        text.push(':');
        push_value(text, value);
    }
    text.push('}');
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a whole float of this size is an i64"
)]
fn push_number(text: &mut String, number: &Number) {
    let whole = number
        .as_f64()
        .filter(|float| number.is_f64() && float.fract() == 0.0 && float.abs() <= MAX_EXACT);
    match whole {
        Some(float) => drop(write!(text, "{}", float as i64)),
        None => drop(write!(text, "{number}")),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        to_canonical_json(&parse("sampling", text).unwrap())
    }

    #[test]
    fn spellings_of_one_value_agree() {
        let spellings = [
            r#"{"b": 1.0, "a": [true, null, "\u00e9\/"]}"#,
            "{ \"a\":[true,null,\"é/\"],\n\"b\":1}",
            r#"{"a":[true,null,"é/"],"b":10e-1}"#,
        ];
        for spelling in spellings {
            assert_eq!(canonical(spelling), r#"{"a":[true,null,"é/"],"b":1}"#);
        }
    }

    #[test]
    fn numbers_keep_their_value() {
        for (spelling, expected) in [
            ("0.1", "0.1"),
            ("0.30000000000000004", "0.30000000000000004"),
            ("-0.0", "0"),
            ("9007199254740993", "9007199254740993"),
            ("18446744073709551615", "18446744073709551615"),
            ("1e300", "1e+300"),
            ("5e-324", "5e-324"),
        ] {
            assert_eq!(canonical(spelling), expected);
        }
    }

    #[test]
    fn nfc_and_nfd_stay_different() {
        assert_ne!(canonical("\"\u{e9}\""), canonical("\"e\u{301}\""));
    }

    #[test]
    fn text_that_is_no_json_is_refused() {
        let deep = "[".repeat(100_000);
        for text in ["", "{", "NaN", "[1,]", &deep] {
            let message = parse("sampling", text).unwrap_err().to_string();
            assert!(message.starts_with("sampling "), "{message}");
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(".*", inner, 0..4)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn canonical_json_reads_as_the_same_canonical_json(value in json()) {
            let once = to_canonical_json(&value);
            prop_assert_eq!(canonical(&once), once);
        }

        #[test]
        fn strings_read_as_themselves(string in any::<String>()) {
            let mut text = String::new();
            push_string(&mut text, &string);
            prop_assert_eq!(serde_json::from_str::<String>(&text).unwrap(), string);
        }
    }
}
