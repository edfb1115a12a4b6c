//! Any text as the request of an imported row: nothing panics, and what is stored has the same key.

#![no_main]

use gad_fast_core::cache::{Key, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str, &str, u32)| {
    let (teacher, messages, sampling, sample_index) = input;
    if let Ok(request) = Request::new(teacher, messages, sampling, sample_index) {
        let again = Request::new(
            request.teacher(),
            request.messages(),
            request.sampling(),
            request.sample_index(),
        );
        assert!(again.is_ok_and(|again| Key::of(&again) == Key::of(&request)));
    }
});
