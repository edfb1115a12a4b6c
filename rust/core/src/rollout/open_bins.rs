//! Bins that still have room, by how much.

use std::collections::BTreeMap;

use super::room_set::{LIMIT, RoomSet};

/// Bins that still have room, by how much; bins with the same room form a stack.
///
/// Usual token budgets lie below the limit of the bit set. What lies above is in a map: a few times
/// slower, and no larger than the bins.
pub(super) struct OpenBins {
    /// Rooms below the limit of which there is a bin.
    small: RoomSet,
    /// The bin on top of each of their stacks.
    small_tops: Vec<usize>,
    /// The bin on top of each stack of larger rooms.
    large_tops: BTreeMap<u64, usize>,
    /// The bin below each in its stack; itself for the lowest.
    below: Vec<usize>,
}

impl OpenBins {
    /// No bins.
    pub(super) fn new() -> Self {
        Self {
            small: RoomSet::default(),
            small_tops: vec![0; LIMIT],
            large_tops: BTreeMap::new(),
            below: Vec::new(),
        }
    }

    /// Takes out the bin with the least room that is enough for `size`, and says how much it is.
    pub(super) fn pop_best(&mut self, size: u64) -> Option<(usize, u64)> {
        self.pop_small(size).or_else(|| self.pop_large(size))
    }

    /// Puts in `bin`, which has this much room; bins are numbered as they first come.
    pub(super) fn push(&mut self, bin: usize, room: u64) {
        if bin >= self.below.len() {
            self.below.resize(bin + 1, bin);
        }
        self.below[bin] = match small(room) {
            Some(room) if self.small.next_from(room) == Some(room) => self.small_tops[room],
            Some(room) => {
                self.small.insert(room);
                bin
            }
            None => self.large_tops.insert(room, bin).unwrap_or(bin),
        };
        if let Some(room) = small(room) {
            self.small_tops[room] = bin;
        }
    }

    fn pop_small(&mut self, size: u64) -> Option<(usize, u64)> {
        let room = self.small.next_from(small(size)?)?;
        let bin = self.small_tops[room];
        let below = self.below[bin];
        if below == bin {
            self.small.remove(room);
        } else {
            self.small_tops[room] = below;
        }
        Some((bin, room as u64))
    }

    fn pop_large(&mut self, size: u64) -> Option<(usize, u64)> {
        let (&room, top) = self.large_tops.range_mut(size..).next()?;
        let bin = *top;
        *top = self.below[bin];
        if *top == bin {
            self.large_tops.remove(&room);
        }
        Some((bin, room))
    }
}

fn small(room: u64) -> Option<usize> {
    usize::try_from(room).ok().filter(|&room| room < LIMIT)
}
