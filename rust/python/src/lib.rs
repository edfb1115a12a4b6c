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

mod errors;
mod rollout;
mod tokenizer;

use pyo3::prelude::*;

/// The Rust core of gad-fast.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::errors::TokenizerError;
    #[pymodule_export]
    use crate::rollout::plan_micro_batches;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;
}
