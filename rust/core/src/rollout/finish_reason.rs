//! Why a rollout ended.

use crate::error::{Error, Result};

/// Why a rollout ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FinishReason {
    /// The student sampled its end token.
    Stop = 0,
    /// It was cut at the token limit.
    Length = 1,
}

impl FinishReason {
    /// The reason that `code` stands for in a column.
    pub fn from_code(code: i64) -> Result<Self> {
        match code {
            0 => Ok(Self::Stop),
            1 => Ok(Self::Length),
            _ => Err(Error::FinishReasonUnknown { code }),
        }
    }

    /// What stands for it in a column.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}
