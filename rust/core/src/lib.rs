//! The core of gad-fast, free of Python: text to packed token ids and back ([`tokenize`]), and the
//! way of rollouts from the engine to packed micro-batches ([`rollout`]).
//!
//! It knows texts, ids, and numbers a token or a rollout. Chat templates, tensors and weights live on
//! the Python side.

pub mod cache;
mod error;
pub mod rollout;
pub mod tokenize;

pub use error::{EncoderError, Error, Result};
