//! Any lengths and limits: nothing panics, and every sequence is in one bin.

#![no_main]

use gad_fast_core::rollout::{PackingLimits, pack_sequences};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<i64>, i64, Option<i64>, i64)| {
    let (lengths, token_budget, max_sequences, pad_to_multiple) = input;
    let limits = PackingLimits {
        token_budget,
        max_sequences,
        pad_to_multiple,
    };
    if let Ok(bins) = pack_sequences(&lengths, &limits) {
        let mut indices = bins.indices.clone();
        indices.sort_unstable();
        assert!(indices.iter().copied().eq(0..lengths.len() as i64));
        assert_eq!(bins.offsets.last().copied(), Some(lengths.len() as i64));
    }
});
