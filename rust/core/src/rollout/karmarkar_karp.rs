//! The differencing method of partitioning numbers into sets with equal sums.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A cost with the total order of its bits; costs are numbers, so it is the usual order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost(pub(super) f64);

impl PartialEq for Cost {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Cost {}

impl PartialOrd for Cost {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Cost {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A set of items: a list through the items themselves, so that two are joined in constant time.
#[derive(Clone, Copy)]
struct Part {
    sum: f64,
    /// The first and the last item, if there is any.
    ends: Option<(usize, usize)>,
}

const EMPTY: Part = Part {
    sum: 0.0,
    ends: None,
};

/// A partition of some of the items: parts with falling sums, without the empty ones.
type Parts = Vec<Part>;

/// The set, of `num_parts`, of each item.
///
/// Two partitions at a time become one, those whose parts differ the most first: the largest part of one
/// joins the smallest of the other. O(n k log k) for n items and k sets.
pub(super) fn partition(costs: &[f64], num_parts: usize) -> Vec<usize> {
    let mut next: Vec<Option<usize>> = vec![None; costs.len()];
    let mut partitions: Vec<Parts> = Vec::with_capacity(costs.len());
    let mut queue = BinaryHeap::with_capacity(costs.len());
    for (item, &sum) in costs.iter().enumerate() {
        let part = Part {
            sum,
            ends: Some((item, item)),
        };
        partitions.push(vec![part]);
        // Lower numbers first among equals, so that the result does not depend on the heap.
        queue.push((Cost(spread(&partitions[item], num_parts)), Reverse(item)));
    }
    while let (Some((_, Reverse(first))), Some((_, Reverse(second)))) = (queue.pop(), queue.pop()) {
        let (a, b) = (take(&mut partitions, first), take(&mut partitions, second));
        let joined = join(&a, &b, num_parts, &mut next);
        queue.push((Cost(spread(&joined, num_parts)), Reverse(first)));
        partitions[first] = joined;
    }
    let last = partitions.into_iter().find(|parts| !parts.is_empty());
    number(&last.unwrap_or_default(), &next)
}

fn take(partitions: &mut [Parts], place: usize) -> Parts {
    std::mem::take(&mut partitions[place])
}

/// Difference between the largest and the smallest sum.
fn spread(parts: &Parts, num_parts: usize) -> f64 {
    let largest = parts.first().map_or(0.0, |part| part.sum);
    let smallest = parts.get(num_parts - 1).map_or(0.0, |part| part.sum);
    largest - smallest
}

/// Joins the largest part of one with the smallest of the other, and so on.
fn join(a: &Parts, b: &Parts, num_parts: usize, next: &mut [Option<usize>]) -> Parts {
    let mut joined = Vec::with_capacity(num_parts.min(a.len() + b.len()));
    for place in 0..num_parts {
        let of_a = a.get(place).copied().unwrap_or(EMPTY);
        let of_b = b.get(num_parts - 1 - place).copied().unwrap_or(EMPTY);
        if let Some(ends) = join_ends(of_a.ends, of_b.ends, next) {
            joined.push(Part {
                sum: of_a.sum + of_b.sum,
                ends: Some(ends),
            });
        }
    }
    joined.sort_by_key(|part| Reverse(Cost(part.sum)));
    joined
}

fn join_ends(
    a: Option<(usize, usize)>,
    b: Option<(usize, usize)>,
    next: &mut [Option<usize>],
) -> Option<(usize, usize)> {
    match (a, b) {
        (Some((start, end)), Some((other_start, other_end))) => {
            next[end] = Some(other_start);
            Some((start, other_end))
        }
        (one, other) => one.or(other),
    }
}

/// The place in `parts` of each item.
fn number(parts: &Parts, next: &[Option<usize>]) -> Vec<usize> {
    let mut part_of = vec![0; next.len()];
    for (place, part) in parts.iter().enumerate() {
        let mut item = part.ends.map(|(start, _)| start);
        while let Some(this) = item {
            part_of[this] = place;
            item = next[this];
        }
    }
    part_of
}
