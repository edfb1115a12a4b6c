//! A stream gives what the whole sequence decodes to, however the ids cut the characters.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::LazyLock;

use gad_fast_core::Error;
use gad_fast_core::tokenize::{HuggingFaceEncoder, TextCodec};
use proptest::prelude::*;
use serde_json::{Value, json};

static BYTE_LEVEL: LazyLock<TextCodec> = LazyLock::new(|| codec(&byte_level()));
static BYTE_FALLBACK: LazyLock<TextCodec> = LazyLock::new(|| codec(&byte_fallback()));
static WORD_PIECES: LazyLock<TextCodec> = LazyLock::new(|| codec(&word_pieces()));

/// The id of a token that is skipped by [`BYTE_LEVEL`].
const SPECIAL: i32 = 257;

fn codec(config: &Value) -> TextCodec {
    let encoder = HuggingFaceEncoder::from_json(config.to_string().as_bytes()).unwrap();
    TextCodec::new(Box::new(encoder), 1)
}

/// A token for each byte, whose id is the byte, and one for two letters.
fn byte_level() -> Value {
    let mut next_stand_in = 0x100;
    let mut vocab: serde_json::Map<String, Value> = (0_u8..=255)
        .map(|byte| {
            let symbol = match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
                _ => {
                    next_stand_in += 1;
                    char::from_u32(next_stand_in - 1).unwrap()
                }
            };
            (symbol.to_string(), byte.into())
        })
        .collect();
    vocab.insert("ab".to_owned(), 256.into());
    json!({
        "version": "1.0",
        "added_tokens": [special(257, "<|end|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    })
}

/// In the manner of Gemma and Llama: byte tokens that a decoder puts together, and a space in front that
/// it takes off.
fn byte_fallback() -> Value {
    let mut vocab: serde_json::Map<String, Value> = (0_u8..=255)
        .map(|byte| (format!("<0x{byte:02X}>"), byte.into()))
        .collect();
    for (token, id) in [
        ("\u{2581}red", 256),
        ("sun", 257),
        ("\u{2581}", 258),
        ("\u{fffd}", 259),
        ("", 260),
    ] {
        vocab.insert(token.to_owned(), id.into());
    }
    json!({
        "version": "1.0",
        "added_tokens": [special(261, "<end>")],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
    })
}

/// In the manner of BERT: words with a space between, and pieces of words.
fn word_pieces() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [special(6, "[SEP]")],
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "red": 1, "##dish": 2, ".": 3, "n't": 4, "##\u{1f600}": 5},
        },
    })
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

fn whole(codec: &TextCodec, ids: &[i32]) -> String {
    let end = i64::try_from(ids.len()).unwrap();
    codec.decode_batch(ids, &[0, end], true).unwrap().remove(0)
}

/// The pieces that the stream gives for each id, and at the end.
fn pieces(codec: &TextCodec, ids: &[i32], stops: &[&str]) -> (Vec<String>, bool) {
    let stops = stops.iter().map(ToString::to_string).collect();
    let mut stream = codec.decode_stream(stops, true).unwrap();
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish());
    (pieces, stream.is_stopped())
}

/// `text` before the stop string that ends first.
fn cut(text: &str, stops: &[&str]) -> (String, bool) {
    let ends = (0..=text.len()).filter(|&end| text.is_char_boundary(end));
    for end in ends {
        let found = stops.iter().filter(|stop| text[..end].ends_with(**stop));
        if let Some(longest) = found.map(|stop| stop.len()).max() {
            return (text[..end - longest].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

#[test]
fn a_character_is_given_with_its_last_byte() {
    let ids: Vec<i32> = "a\u{1f600}b".bytes().map(i32::from).collect();
    let (pieces, _) = pieces(&BYTE_LEVEL, &ids, &[]);
    assert_eq!(pieces, ["a", "", "", "", "\u{1f600}", "b", ""]);
}

#[test]
fn what_may_become_a_stop_string_is_held_back() {
    let ids: Vec<i32> = "so<stay<stop>no".bytes().map(i32::from).collect();
    let (pieces, is_stopped) = pieces(&BYTE_LEVEL, &ids, &["<stop>"]);
    let expected = [
        "s", "o", "", "", "", "<sta", "y", "", "", "", "", "", "", "", "", "",
    ];
    assert_eq!(pieces, expected);
    assert!(is_stopped);
}

#[test]
fn the_end_of_a_sequence_gives_all_that_was_held_back() {
    let (pieces, is_stopped) = pieces(&BYTE_LEVEL, &[97, 60, 115, 0xf0, 0x9f], &["<stop>"]);
    assert_eq!(pieces.last().unwrap(), "<s\u{fffd}");
    assert!(!is_stopped);
}

#[test]
fn a_stop_string_within_one_token_cuts_it() {
    let (pieces, is_stopped) = pieces(&BYTE_LEVEL, &[120, 256, 121], &["ax", "b"]);
    assert_eq!(pieces, ["x", "a", "", ""]);
    assert!(is_stopped);
}

#[test]
fn ids_after_the_end_are_passed_over() {
    let mut stream = BYTE_LEVEL.decode_stream(vec![], true).unwrap();
    assert_eq!(stream.push(97).unwrap(), "a");
    assert_eq!(stream.push(100_000).unwrap(), "");
    assert_eq!(stream.finish(), "");
    assert_eq!(stream.push(98).unwrap(), "");
    assert_eq!(stream.finish(), "");
}

#[test]
fn a_negative_id_and_an_empty_stop_string_are_errors() {
    let mut stream = BYTE_LEVEL.decode_stream(vec![], true).unwrap();
    stream.push(97).unwrap();
    let error = stream.push(-7).unwrap_err();
    assert!(
        matches!(
            error,
            Error::IdNegative {
                id: -7,
                position: 1
            }
        ),
        "{error}"
    );
    let stops = vec!["a".to_owned(), String::new()];
    let error = BYTE_LEVEL.decode_stream(stops, true).err().unwrap();
    assert!(
        matches!(error, Error::StopEmpty { stop_index: 1 }),
        "{error}"
    );
}

/// Bytes of characters, whole ones and parts, and any other.
fn bytes() -> impl Strategy<Value = Vec<i32>> {
    let character = prop_oneof![
        Just("\u{1f468}\u{200d}\u{1f469}".to_owned()),
        Just("\u{fffd}".to_owned()),
        Just(" red".to_owned()),
        any::<char>().prop_map(|character| character.to_string()),
    ];
    let whole = character.prop_map(|text| text.bytes().map(i32::from).collect::<Vec<_>>());
    let any_id = (0_i32..262).prop_map(|id| vec![id]);
    let part = prop_oneof![6 => whole, 1 => any_id, 1 => prop_oneof![Just(SPECIAL), Just(261), Just(6)].prop_map(|id| vec![id])];
    prop::collection::vec(part, 0..60).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn the_pieces_make_up_the_whole(ids in bytes()) {
        for codec in [&*BYTE_LEVEL, &BYTE_FALLBACK, &WORD_PIECES] {
            let (pieces, _) = pieces(codec, &ids, &[]);
            prop_assert_eq!(pieces.concat(), whole(codec, &ids));
        }
    }

    #[test]
    fn the_pieces_make_up_the_whole_of_tokens_of_words(
        ids in prop::collection::vec(prop_oneof![0_i32..7, 255_i32..262, 0xe2_i32..0xe4], 0..120)
    ) {
        for codec in [&*BYTE_FALLBACK, &WORD_PIECES] {
            let (pieces, _) = pieces(codec, &ids, &[]);
            prop_assert_eq!(pieces.concat(), whole(codec, &ids));
        }
    }

    #[test]
    fn the_pieces_end_before_the_first_stop_string(
        ids in prop::collection::vec(prop_oneof![97_i32..100, Just(256), Just(32), Just(0xc3), Just(0xa9)], 0..60),
        stops in prop::collection::vec("[abc \u{e9}]{1,5}", 0..4),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let (pieces, is_stopped) = pieces(&BYTE_LEVEL, &ids, &stops);
        prop_assert_eq!((pieces.concat(), is_stopped), cut(&whole(&BYTE_LEVEL, &ids), &stops));
    }
}
