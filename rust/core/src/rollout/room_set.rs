//! A set of small numbers that finds the next one quickly.

/// Numbers are below this.
pub(super) const LIMIT: usize = 1 << 16;

/// A set of numbers below [`LIMIT`], as bits; a bit of each further level says whether a word of the
/// level before holds any. So the next number is found in at most five steps.
pub(super) struct RoomSet {
    levels: [Vec<u64>; 3],
}

impl Default for RoomSet {
    fn default() -> Self {
        let words = |level: u32| vec![0; LIMIT.div_ceil(64_usize.pow(level + 1))];
        Self {
            levels: [words(0), words(1), words(2)],
        }
    }
}

impl RoomSet {
    pub(super) fn insert(&mut self, mut number: usize) {
        for level in &mut self.levels {
            level[number / 64] |= 1 << (number % 64);
            number /= 64;
        }
    }

    pub(super) fn remove(&mut self, mut number: usize) {
        for level in &mut self.levels {
            level[number / 64] &= !(1 << (number % 64));
            if level[number / 64] != 0 {
                return;
            }
            number /= 64;
        }
    }

    /// The least number in the set that is at least `bound`.
    pub(super) fn next_from(&self, bound: usize) -> Option<usize> {
        let mut number = bound;
        for (height, level) in self.levels.iter().enumerate() {
            let word = level.get(number / 64)? & (u64::MAX << (number % 64));
            if word != 0 {
                return Some(self.lowest_below(height, number / 64 * 64 + lowest_bit(word)));
            }
            // Nothing in the rest of this word: the next word that holds any.
            number = number / 64 + 1;
        }
        None
    }

    /// The least number under a bit of a level.
    fn lowest_below(&self, height: usize, number: usize) -> usize {
        self.levels[..height]
            .iter()
            .rev()
            .fold(number, |number, level| {
                number * 64 + lowest_bit(level[number])
            })
    }
}

fn lowest_bit(word: u64) -> usize {
    word.trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_at_either_end_is_found_from_anywhere_below() {
        let mut set = RoomSet::default();
        assert_eq!(set.next_from(0), None);
        set.insert(LIMIT - 1);
        for bound in [0, 63, 64, 4_095, 4_096, LIMIT - 1] {
            assert_eq!(set.next_from(bound), Some(LIMIT - 1));
        }
        set.insert(0);
        assert_eq!(set.next_from(0), Some(0));
        set.remove(LIMIT - 1);
        assert_eq!(set.next_from(1), None);
        assert_eq!(set.next_from(LIMIT), None);
    }

    proptest! {
        #[test]
        fn it_does_what_the_set_of_the_standard_library_does(
            steps in prop::collection::vec((any::<bool>(), 0..LIMIT, 0..LIMIT), 0..300),
        ) {
            let mut set = RoomSet::default();
            let mut model = BTreeSet::new();
            for (is_new, number, bound) in steps {
                if is_new {
                    set.insert(number);
                    model.insert(number);
                } else if let Some(&gone) = model.range(number..).next() {
                    set.remove(gone);
                    model.remove(&gone);
                }
                prop_assert_eq!(set.next_from(bound), model.range(bound..).next().copied());
            }
        }
    }
}
