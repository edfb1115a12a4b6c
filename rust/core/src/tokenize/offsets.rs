//! Sequences laid end to end, cut again.

use crate::error::{Error, Result};

/// The sequences that `offsets` cut `values` into; `malformed` names the first offset that is wrong.
pub(super) fn split_at_offsets<'a, T>(
    values: &'a [T],
    offsets: &[i64],
    malformed: impl Fn(usize, i64) -> Error,
) -> Result<Vec<&'a [T]>> {
    let last = offsets.len().checked_sub(1).ok_or(Error::OffsetsEmpty)?;
    let mut sequences = Vec::with_capacity(last);
    let mut start = 0;
    for (position, &offset) in offsets.iter().enumerate() {
        let end = usize::try_from(offset)
            .ok()
            .filter(|end| (start..=values.len()).contains(end))
            .filter(|&end| position > 0 || end == 0)
            .filter(|&end| position < last || end == values.len())
            .ok_or_else(|| malformed(position, offset))?;
        if position > 0 {
            sequences.push(&values[start..end]);
        }
        start = end;
    }
    Ok(sequences)
}

/// The texts of `data`, which is UTF-8 laid end to end as in a string array of Arrow.
pub fn split_texts<'a>(data: &'a [u8], offsets: &[i64]) -> Result<Vec<&'a str>> {
    let texts = split_at_offsets(data, offsets, |position, offset| {
        Error::BoundariesMalformed {
            name: "offsets",
            position,
            offset,
            things: "bytes",
            count: data.len(),
        }
    })?;
    texts
        .into_iter()
        .enumerate()
        .map(|(text_index, text)| {
            std::str::from_utf8(text).map_err(|error| Error::TextNotUtf8 {
                text_index,
                position: error.valid_up_to(),
            })
        })
        .collect()
}
