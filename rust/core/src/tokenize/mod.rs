//! Text to packed token ids and back, a batch at a time.
//!
//! [`TextCodec`] owns the batch: packing, threads, checks of what comes in. The tokenizer behind it is
//! an [`Encoder`], which sees one text or one sequence of ids at a time. [`DecodeStream`] decodes while
//! a sequence grows.

mod batch;
mod codec;
mod encoder;
mod hugging_face;
mod offsets;
mod responses;
mod stand_ins;
mod stops;
mod stream;
mod vocabulary;
mod workers;

pub use batch::TokenBatch;
pub use codec::TextCodec;
pub use encoder::Encoder;
pub use hugging_face::HuggingFaceEncoder;
pub use offsets::split_texts;
pub use stream::DecodeStream;
