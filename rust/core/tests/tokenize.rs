//! The codec over small tokenizers that are written out here.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use gad_fast_core::tokenize::{Encoder, HuggingFaceEncoder, TextCodec, TokenBatch, split_texts};
use gad_fast_core::{EncoderError, Error};
use serde_json::{Value, json};

/// Words by white space; no unknown token, so that a word outside of the vocabulary is an error.
fn word_level() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [special(4, "<eos>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"the": 0, "cat": 1, "sat": 2}, "unk_token": "<unk>"},
    })
}

/// Byte-level BPE over the 256 bytes with the merges for " the", in the format of before 2022: no type,
/// merges as strings.
fn byte_level_bpe() -> Value {
    let mut vocab = serde_json::Map::new();
    for symbol in byte_symbols() {
        vocab.insert(symbol.to_string(), vocab.len().into());
    }
    for merged in ["th", "the", "\u{120}the"] {
        vocab.insert(merged.to_owned(), vocab.len().into());
    }
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(259, "<|end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "model": {"vocab": vocab, "merges": ["t h", "th e", "\u{120} the"]},
    })
}

/// The character that stands for each byte: itself if it is printable, else one from U+0100 on.
fn byte_symbols() -> Vec<char> {
    let mut next_stand_in = 0x100;
    (0_u8..=255)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next_stand_in += 1;
                char::from_u32(next_stand_in - 1).unwrap()
            }
        })
        .collect()
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

fn codec(config: &Value, num_threads: usize) -> TextCodec {
    let encoder = HuggingFaceEncoder::from_json(config.to_string().as_bytes()).unwrap();
    TextCodec::new(Box::new(encoder), num_threads)
}

fn byte_id(byte: u8) -> i32 {
    i32::from(byte)
}

#[test]
fn ids_are_packed_and_offsets_cut_them() {
    let batch = codec(&word_level(), 1)
        .encode_batch(&["the cat", "", "sat"])
        .unwrap();
    assert_eq!(batch.ids, [0, 1, 2]);
    assert_eq!(batch.offsets, [0, 2, 2, 3]);
}

#[test]
fn no_texts_make_an_empty_batch() {
    let batch = codec(&word_level(), 4).encode_batch(&[]).unwrap();
    let empty = TokenBatch {
        ids: vec![],
        offsets: vec![0],
    };
    assert_eq!(batch, empty);
}

#[test]
fn merges_and_special_tokens_of_an_old_file_are_applied() {
    let batch = codec(&byte_level_bpe(), 1)
        .encode_batch(&["the the<|end|>\n", "\u{e9}"])
        .unwrap();
    assert_eq!(
        batch.ids,
        [257, 258, 259, byte_id(b'\n'), byte_id(0xc3), byte_id(0xa9)]
    );
    assert_eq!(batch.offsets, [0, 4, 6]);
}

/// [`byte_level_bpe`] without tokens for the bytes 3 and 4, its other ids closed up, and an added token
/// that the model does not know.
fn byte_level_bpe_that_lacks_bytes(unknown: &Value, is_run_fused: bool) -> Value {
    let mut config = byte_level_bpe();
    let symbols = byte_symbols();
    let vocab = config["model"]["vocab"].as_object_mut().unwrap();
    for byte in [3, 4] {
        vocab.remove(&symbols[byte].to_string());
    }
    for id in vocab.values_mut().filter(|id| id.as_u64() > Some(4)) {
        *id = (id.as_u64().unwrap() - 2).into();
    }
    config["model"]["unk_token"] = unknown.clone();
    config["model"]["fuse_unk"] = is_run_fused.into();
    config["added_tokens"] = json!([special(257, "<|end|>")]);
    config
}

#[test]
fn a_byte_without_a_token_becomes_the_unknown_token_or_nothing() {
    let text = "a\u{3}\u{4}\u{3} the<|end|>\u{4}";
    let [a, unknown, the, end] = [byte_id(b'a') - 2, 0, 256, 257];
    for (token, is_run_fused, expected) in [
        (json!("\u{100}"), true, vec![a, unknown, the, end, unknown]),
        (
            json!("\u{100}"),
            false,
            vec![a, unknown, unknown, unknown, the, end, unknown],
        ),
        (json!(null), true, vec![a, the, end]),
    ] {
        let codec = codec(&byte_level_bpe_that_lacks_bytes(&token, is_run_fused), 1);
        let batch = codec.encode_batch(&[text]).unwrap();
        assert_eq!(batch.ids, expected);

        assert_eq!(codec.vocab_size(), 258);
        assert_eq!(codec.token_to_id("<|end|>"), Some(end.cast_unsigned()));
        let decoded = codec
            .decode_batch(&[a, the, 258, end], &[0, 4], false)
            .unwrap();
        assert_eq!(decoded, ["a the<|end|>"]);
    }
}

#[test]
fn the_truncation_of_the_file_is_ignored() {
    let batch = codec(&byte_level_bpe(), 1)
        .encode_batch(&["a b c d e f"])
        .unwrap();
    assert_eq!(batch.ids.len(), 11);
}

#[test]
fn the_batch_does_not_depend_on_the_number_of_threads() {
    let texts: Vec<String> = (0..400)
        .map(|index| "the quick the lazy \u{1f600}<|end|>".repeat(index % 37))
        .collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    assert!(texts.iter().map(|text| text.len()).sum::<usize>() > 200_000);

    let expected = codec(&byte_level_bpe(), 1).encode_batch(&texts).unwrap();
    for num_threads in [0, 2, 3, 8] {
        let batch = codec(&byte_level_bpe(), num_threads)
            .encode_batch(&texts)
            .unwrap();
        assert_eq!(batch, expected);
    }
}

#[test]
fn decoding_gives_back_the_text() {
    let codec = codec(&byte_level_bpe(), 1);
    let texts = [
        "the the",
        "",
        "\r\n\u{65}\u{301} \u{1f468}\u{200d}\u{1f469}",
        "x<|end|>y",
    ];
    let TokenBatch { ids, offsets } = codec.encode_batch(&texts).unwrap();
    assert_eq!(codec.decode_batch(&ids, &offsets, false).unwrap(), texts);
    let skipped = codec.decode_batch(&ids, &offsets, true).unwrap();
    assert_eq!(skipped[3], "xy");
}

#[test]
fn a_character_cut_in_two_becomes_the_replacement_character() {
    let texts = codec(&byte_level_bpe(), 1)
        .decode_batch(&[byte_id(b'a'), byte_id(0xc3)], &[0, 2], false)
        .unwrap();
    assert_eq!(texts, ["a\u{fffd}"]);
}

#[test]
fn tokens_are_looked_up_as_the_file_spells_them() {
    let codec = codec(&byte_level_bpe(), 1);
    assert_eq!(codec.vocab_size(), 260);
    assert_eq!(codec.token_to_id("\u{120}the"), Some(258));
    assert_eq!(codec.token_to_id("<|end|>"), Some(259));
    assert_eq!(codec.token_to_id(" the"), None);
}

#[test]
fn ids_without_a_token_are_passed_over_and_negative_ones_are_an_error() {
    let mut config = word_level();
    config["model"]["vocab"] = json!({"the": 0, "cat": 1, "sat": 5});
    let codec = codec(&config, 1);
    for id in [2, 6, i32::MAX] {
        let texts = codec.decode_batch(&[0, id, 5], &[0, 3], false).unwrap();
        assert_eq!(texts, ["the sat"]);
    }
    for id in [-1, i32::MIN] {
        let error = codec.decode_batch(&[0, id], &[0, 2], false).unwrap_err();
        assert!(
            matches!(error, Error::IdNegative { id: found, position: 1 } if found == id),
            "{error}"
        );
    }
}

#[test]
fn offsets_that_do_not_cut_the_ids_are_an_error() {
    let codec = codec(&word_level(), 1);
    let decode = |offsets: &[i64]| codec.decode_batch(&[0, 1, 2], offsets, false);
    assert!(matches!(decode(&[]), Err(Error::OffsetsEmpty)));
    for (offsets, wrong) in [
        (vec![0], 0),
        (vec![1, 3], 0),
        (vec![-1, 3], 0),
        (vec![0, 2, 1, 3], 2),
        (vec![0, 2], 1),
        (vec![0, 4], 1),
        (vec![0, i64::MIN, i64::MAX, 3], 1),
    ] {
        let error = decode(&offsets).unwrap_err();
        assert!(
            matches!(error, Error::OffsetsMalformed { position, .. } if position == wrong),
            "{offsets:?}: {error}"
        );
    }
    assert_eq!(decode(&[0, 0, 3, 3]).unwrap().len(), 3);
}

#[test]
fn a_missing_file_and_a_file_of_something_else_are_told_apart() {
    let error = TextCodec::from_file(Path::new("no/such/tokenizer.json"));
    assert!(matches!(error, Err(Error::TokenizerUnreadable { .. })));

    for json in [
        "",
        "[]",
        "{}",
        r#"{"model": {"type": "Sorcery", "vocab": {}}}"#,
    ] {
        let error = HuggingFaceEncoder::from_json(json.as_bytes())
            .err()
            .unwrap();
        assert!(
            matches!(error, Error::TokenizerNotUnderstood { .. }),
            "{error}"
        );
    }
}

/// Refuses texts with an exclamation mark.
struct QuietEncoder;

impl Encoder for QuietEncoder {
    fn encode_into(&self, text: &str, ids: &mut Vec<i32>) -> Result<(), EncoderError> {
        if text.contains('!') {
            return Err("too loud".into());
        }
        ids.extend(text.bytes().map(i32::from));
        Ok(())
    }

    fn decode(&self, _: &[u32], _: bool) -> Result<String, EncoderError> {
        Err("nothing to say".into())
    }

    fn token_to_id(&self, _: &str) -> Option<u32> {
        None
    }

    fn contains(&self, id: u32) -> bool {
        id < 256
    }

    fn vocab_size(&self) -> usize {
        256
    }
}

#[test]
fn an_error_names_the_text_even_from_another_thread() {
    let long = "x".repeat(100_000);
    let mut texts = vec![&*long; 20];
    texts[17] = "oh!";
    let error = TextCodec::new(Box::new(QuietEncoder), 4)
        .encode_batch(&texts)
        .unwrap_err();
    assert_eq!(error.to_string(), "text 17 cannot be encoded: too loud");
}

#[test]
fn an_error_names_the_sequence_that_cannot_be_decoded() {
    let error = TextCodec::new(Box::new(QuietEncoder), 1)
        .decode_batch(&[1, 2], &[0, 2], true)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "sequence 0 cannot be decoded: nothing to say"
    );
}

#[test]
fn texts_laid_end_to_end_are_cut_without_a_copy() {
    let data = "the caf\u{e9}";
    let texts = split_texts(data.as_bytes(), &[0, 3, 3, 9]).unwrap();
    assert_eq!(texts, ["the", "", " caf\u{e9}"]);
    assert_eq!(texts[0].as_ptr(), data.as_ptr());
    assert!(split_texts(b"", &[0]).unwrap().is_empty());
}

#[test]
fn bytes_that_are_no_text_are_an_error() {
    let data = "the caf\u{e9}";
    let error = split_texts(data.as_bytes(), &[0, 3, 8, 9]).unwrap_err();
    let expected = "text 1 is no UTF-8 from its byte 4 on";
    assert!(error.to_string().starts_with(expected), "{error}");
    for offsets in [
        vec![],
        vec![0, 8],
        vec![0, 5, 4, 9],
        vec![0, i64::MAX],
        vec![-1, 9],
    ] {
        let error = split_texts(data.as_bytes(), &offsets).unwrap_err();
        assert!(error.to_string().starts_with("offsets"), "{error}");
    }
}

#[test]
fn a_batch_ends_between_two_texts_when_the_caller_says_so() {
    let long = "the cat sat ".repeat(100);
    let texts = vec![&*long; 200_000];
    for num_threads in [1, 3] {
        let error = codec(&word_level(), num_threads)
            .encode_batch_while(&texts, || false)
            .unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error}");
    }
}
