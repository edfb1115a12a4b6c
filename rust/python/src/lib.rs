//! `gad_fast._core`: the core under the conventions of Python.
//!
//! Conversions and error mapping only; what is computed is in `gad-fast-core`. Python strings are
//! borrowed, arrays that leave take over the memory of the vector they come from, and the interpreter is
//! released during everything that takes longer than a microsecond. A panic is a bug of ours; `PyO3`
//! turns it into a Python exception.

#![expect(
    clippy::needless_pass_by_value,
    reason = "PyO3 hands over the arguments of a function"
)]

mod arrays;
mod batch;
mod buffer;
mod cache;
mod cache_row;
mod errors;
mod json;
mod mailbox;
mod packing;
mod rollout;
mod stream;
mod tokenizer;

use pyo3::prelude::*;

/// The Rust core of gad-fast.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::cache::{Cache, cache_after_fork, cache_before_fork, cache_key};
    #[pymodule_export]
    use crate::errors::TokenizerError;
    #[pymodule_export]
    use crate::errors::{CacheCorruptError, CacheError, CacheLockedError};
    #[pymodule_export]
    use crate::mailbox::Mailbox;
    #[pymodule_export]
    const FINISH_LENGTH: u8 = gad_fast_core::rollout::FinishReason::Length.code();
    #[pymodule_export]
    const FINISH_STOP: u8 = gad_fast_core::rollout::FinishReason::Stop.code();
    #[pymodule_export]
    use crate::batch::RolloutBatch;
    #[pymodule_export]
    use crate::buffer::RolloutBuffer;
    #[pymodule_export]
    use crate::packing::{balance, group_layout, pack_groups, pack_sequences, same_count};
    #[pymodule_export]
    use crate::rollout::plan_micro_batches;
    #[pymodule_export]
    use crate::stream::DecodeStream;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;
}
