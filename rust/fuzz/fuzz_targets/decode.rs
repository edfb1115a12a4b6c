//! Any ids, offsets and stop strings: nothing panics, and a stream gives the text of the batch.

#![no_main]

use std::sync::LazyLock;

use gad_fast_core::tokenize::{HuggingFaceEncoder, TextCodec, split_texts};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

static CODECS: LazyLock<[TextCodec; 2]> =
    LazyLock::new(|| [codec(&byte_level()), codec(&byte_fallback())]);

fn codec(config: &Value) -> TextCodec {
    let encoder = HuggingFaceEncoder::from_json(config.to_string().as_bytes()).unwrap();
    TextCodec::new(Box::new(encoder), 1)
}

fn byte_level() -> Value {
    let mut stand_ins = (0x100..).map(|code| char::from_u32(code).unwrap());
    let mut vocab = Map::new();
    for byte in 0_u8..=255 {
        let symbol = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => stand_ins.next().unwrap(),
        };
        vocab.insert(symbol.to_string(), byte.into());
    }
    with_special(json!({
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }))
}

fn byte_fallback() -> Value {
    let vocab: Map<String, Value> = (0_u8..=255)
        .map(|byte| (format!("<0x{byte:02X}>"), byte.into()))
        .collect();
    with_special(json!({
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
    }))
}

fn with_special(mut config: Value) -> Value {
    config["version"] = json!("1.0");
    config["added_tokens"] = json!([{
        "id": 256, "content": "<end>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    }]);
    config
}

fuzz_target!(|input: (Vec<u16>, Vec<i16>, Vec<String>, Vec<u8>)| {
    let (ids, offsets, stops, data) = input;
    let ids: Vec<i32> = ids.into_iter().map(|id| i32::from(id) % 300).collect();
    let offsets: Vec<i64> = offsets.into_iter().map(i64::from).collect();
    let _ = split_texts(&data, &offsets);
    for codec in &*CODECS {
        let _ = codec.decode_batch(&ids, &offsets, false);
        let Ok(whole) = codec.decode_batch(&ids, &[0, ids.len() as i64], true) else {
            continue;
        };
        let Ok(mut stream) = codec.decode_stream(stops.clone(), true) else {
            continue;
        };
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text.push_str(&stream.finish());
        assert!(whole[0].starts_with(&text));
        assert_eq!(
            stream.is_stopped(),
            stops.iter().any(|stop| whole[0].contains(stop))
        );
        assert!(stream.is_stopped() || whole[0] == text);
    }
});
