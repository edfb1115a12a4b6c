//! What the trainer does with rollouts before they become tensors.

mod micro_batches;

pub use micro_batches::{MicroBatchItem, plan_micro_batches};
