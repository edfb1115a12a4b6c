//! What the trainer does with rollouts before they become tensors.

mod advantages;
mod arguments;
mod balancing;
mod batch;
mod bins;
mod buffer;
mod finish_reason;
mod gathering;
mod group;
mod group_packing;
mod karmarkar_karp;
mod micro_batches;
mod open_bins;
mod packing;
mod room_set;

pub use advantages::{AdvantageOptions, group_advantages};
pub use balancing::{CostModel, balance, same_count};
pub use batch::RolloutBatch;
pub use bins::Bins;
pub use buffer::{RolloutBuffer, Taken};
pub use finish_reason::FinishReason;
pub use gathering::PackedRows;
pub use group::Rollout;
pub use group_packing::{GroupLayout, GroupLengths};
pub use micro_batches::{MicroBatchItem, plan_micro_batches};
pub use packing::{PackingLimits, pack_sequences};
