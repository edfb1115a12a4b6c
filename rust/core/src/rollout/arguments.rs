//! Checks of numbers that come from outside, and conversions between the widths of counts.

use crate::error::{Error, Result};

/// A count that is at least `minimum`, which is not negative.
pub(super) fn at_least(name: &'static str, value: i64, minimum: u32) -> Result<u64> {
    u64::try_from(value)
        .ok()
        .filter(|&count| count >= minimum.into())
        .ok_or(Error::TooSmall {
            name,
            value,
            minimum: minimum.into(),
        })
}

/// A number of tokens that can hold one.
pub(super) fn token_budget(token_budget: i64) -> Result<u64> {
    at_least("token_budget", token_budget, 1)
        .map_err(|_| Error::TokenBudgetTooSmall { token_budget })
}

/// `value` as the length of something in memory: what is larger is as good as `usize::MAX`.
pub(super) fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `values`, none of which is negative, as they came.
///
/// The sign bits are joined first, eight numbers at a time: searching would be one at a time.
pub(super) fn lengths<'a>(name: &'static str, values: &'a [i64]) -> Result<&'a [i64]> {
    if values.iter().fold(0, |joined, &value| joined | value) >= 0 {
        return Ok(values);
    }
    Err(first_negative(name, values.iter().copied()))
}

/// Checks that no id is negative, as `lengths` does.
pub(super) fn ids(name: &'static str, values: &[i32]) -> Result<()> {
    if values.iter().fold(0, |joined, &value| joined | value) >= 0 {
        return Ok(());
    }
    Err(first_negative(name, values.iter().map(|&id| id.into())))
}

fn first_negative(name: &'static str, values: impl Iterator<Item = i64>) -> Error {
    let (index, value) = values
        .enumerate()
        .find(|&(_, value)| value < 0)
        .unwrap_or_default();
    Error::Negative { name, index, value }
}

/// Checks that `values` are numbers, and neither infinite.
pub(super) fn finite(name: &'static str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            name,
            index,
            value: values[index].into(),
        }),
    }
}

/// Checks that a setting is a number of at least 0, and not infinite.
pub(super) fn at_least_zero(name: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::SettingOutOfRange {
        name,
        value,
        allowed: "a finite number of at least 0",
    })
}

/// Checks that a column has one entry for each of `expected` things.
pub(super) fn length_of(
    name: &str,
    length: usize,
    expected: usize,
    thing: &'static str,
) -> Result<()> {
    if length == expected {
        return Ok(());
    }
    Err(Error::LengthDiffers {
        name: name.to_owned(),
        length,
        expected,
        thing,
    })
}

/// The position in a column of `count` entries that `value` names.
pub(super) fn index(
    name: &'static str,
    position: usize,
    value: i64,
    count: usize,
) -> Result<usize> {
    usize::try_from(value)
        .ok()
        .filter(|&index| index < count)
        .ok_or(Error::IndexOutOfRange {
            name,
            position,
            value,
            count,
        })
}

/// Checks that offsets run from 0 to the `count` of what they cut, and never fall.
pub(super) fn check_offsets(
    name: &'static str,
    offsets: &[i64],
    count: usize,
    things: &'static str,
) -> Result<()> {
    let last = offsets.len().checked_sub(1).ok_or(Error::OffsetsEmpty)?;
    let mut start = 0;
    for (position, &offset) in offsets.iter().enumerate() {
        start = usize::try_from(offset)
            .ok()
            .filter(|end| (start..=count).contains(end))
            .filter(|&end| position > 0 || end == 0)
            .filter(|&end| position < last || end == count)
            .ok_or(Error::BoundariesMalformed {
                name,
                position,
                offset,
                things,
                count,
            })?;
    }
    Ok(())
}

/// A count of things in memory in the width of the arrays.
#[expect(
    clippy::cast_possible_wrap,
    reason = "a Vec holds at most isize::MAX bytes"
)]
pub(super) fn to_int64(count: usize) -> i64 {
    count as i64
}

/// The total of a forward pass in the width that attention kernels take.
pub(super) fn to_int32(num_tokens: u64) -> Result<i32> {
    i32::try_from(num_tokens).map_err(|_| Error::TooManyTokens { num_tokens })
}
