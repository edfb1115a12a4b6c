//! The core of gad-fast, free of Python: text to packed token ids and back ([`tokenize`]), and the
//! packing of rollouts into micro-batches ([`rollout`]).
//!
//! It knows texts, ids and lengths. Chat templates, tensors and weights live on the Python side.

mod error;
pub mod rollout;
pub mod tokenize;

pub use error::{EncoderError, Error, Result};
