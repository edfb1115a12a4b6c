//! Which rank does what, so that all are done at about the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::arguments::{at_least, at_least_zero, to_int64, to_usize};
use super::bins::Bins;
use super::karmarkar_karp::{self, Cost};
use crate::error::{Error, Result};

/// Items times ranks up to which differencing takes less than half a second.
const MAX_KARMARKAR_KARP: usize = 1_000_000;

/// Ranks of the largest cluster, with room to spare; memory is bounded by it.
const MAX_RANKS: i64 = 1 << 20;

/// Ranks and items to look at while exchanging: some 100 ms.
const MAX_EXCHANGE_WORK: usize = 1 << 26;

/// A schedule of half a gigabyte.
const MAX_CELLS: usize = 1 << 26;

/// What work of size n costs: `linear * n + quadratic * n^2`, in any unit.
///
/// The linear part is that of the matrix products, the quadratic one that of attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Cost of a unit of size, at least 0.
    pub linear: f64,
    /// Cost of a unit of size, squared, at least 0.
    pub quadratic: f64,
}

impl CostModel {
    /// The cost of each size; sizes are at least 0.
    fn costs(self, sizes: &[f64]) -> Result<Vec<f64>> {
        at_least_zero("linear", self.linear)?;
        at_least_zero("quadratic", self.quadratic)?;
        let cost = |(index, &size): (usize, &f64)| {
            let cost = self.linear * size + self.quadratic * size * size;
            // A sum of costs must stay a number as well.
            if size >= 0.0 && cost <= f64::MAX / 1e20 {
                return Ok(cost);
            }
            Err(Error::SizeOutOfRange { index, size })
        };
        sizes.iter().enumerate().map(cost).collect()
    }
}

/// Distributes items of these sizes over ranks, so that the most loaded rank has little more than its share.
///
/// Karmarkar-Karp differencing where items times ranks allow it; above that, each item goes from the
/// costliest on to the least loaded rank, and a bounded number of exchanges evens out the rest. Ranks get
/// as many items as it takes, possibly none; the first rank has the highest load, and a rank's items
/// come costliest first. Every index comes exactly once, and the result is the same on every machine.
///
/// Sources: Karmarkar and Karp, The differencing method of set partitioning, 1982; Graham, Bounds on
/// multiprocessing timing anomalies, 1969.
pub fn balance(sizes: &[f64], model: CostModel, num_ranks: i64) -> Result<Bins> {
    let costs = model.costs(sizes)?;
    let num_ranks = to_usize(at_least("num_ranks", num_ranks, 1)?);
    if to_int64(num_ranks) > MAX_RANKS {
        return Err(Error::TooManyRanks {
            num_ranks,
            most: MAX_RANKS,
        });
    }
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_cached_key(|&item| Reverse(Cost(costs[item])));
    let rank_of = if costs.len().saturating_mul(num_ranks) <= MAX_KARMARKAR_KARP {
        karmarkar_karp::partition(&costs, num_ranks)
    } else {
        let mut ranks = Ranks::fill(&costs, &order, num_ranks);
        ranks.exchange(&costs);
        ranks.rank_of(costs.len())
    };
    let rank_of = by_decreasing_load(&rank_of, &costs, num_ranks);
    let mut num_items = vec![0; num_ranks];
    for &rank in &rank_of {
        num_items[rank] += 1;
    }
    let pairs = order.iter().map(|&item| (rank_of[item], item));
    Ok(Bins::from_pairs(pairs, &num_items))
}

/// A schedule in which all ranks do the same number of micro-batches: row r holds those of rank r, and
/// -1 for each empty one that is appended.
///
/// A rank with fewer would leave the others waiting in a collective operation. Gives the schedule row
/// by row, and the length of a row.
pub fn same_count(ranks: &Bins) -> Result<(Vec<i64>, usize)> {
    let count = ranks.iter().map(<[i64]>::len).max().unwrap_or(0);
    let num_cells = ranks.len().saturating_mul(count);
    if num_cells > MAX_CELLS {
        return Err(Error::ScheduleTooLarge { num_cells });
    }
    let mut schedule = Vec::with_capacity(num_cells);
    for (rank, indices) in ranks.iter().enumerate() {
        schedule.extend_from_slice(indices);
        schedule.resize((rank + 1) * count, -1);
    }
    Ok((schedule, count))
}

/// Loads and items of ranks that are filled one item at a time.
struct Ranks {
    loads: Vec<f64>,
    items: Vec<Vec<usize>>,
}

impl Ranks {
    /// Longest processing time first: each item in `order` goes to the least loaded rank.
    fn fill(costs: &[f64], order: &[usize], num_ranks: usize) -> Self {
        let mut ranks = Self {
            loads: vec![0.0; num_ranks],
            items: vec![Vec::new(); num_ranks],
        };
        let mut queue: BinaryHeap<_> = (0..num_ranks)
            .map(|rank| Reverse((Cost(0.0), rank)))
            .collect();
        for &item in order {
            let Some(mut least) = queue.peek_mut() else {
                break;
            };
            let (load, rank) = &mut least.0;
            load.0 += costs[item];
            ranks.loads[*rank] = load.0;
            ranks.items[*rank].push(item);
        }
        ranks
    }

    /// Evens out the most and the least loaded rank, again and again while that helps.
    fn exchange(&mut self, costs: &[f64]) {
        let num_ranks = self.loads.len();
        let num_rounds =
            (4 * num_ranks).min(MAX_EXCHANGE_WORK / (num_ranks + costs.len() / num_ranks));
        for _ in 0..num_rounds {
            let by_load = |&a: &usize, &b: &usize| self.loads[a].total_cmp(&self.loads[b]);
            let all = || 0..num_ranks;
            let (Some(most), Some(least)) = (all().max_by(by_load), all().min_by(by_load)) else {
                return;
            };
            let Some((give, take)) = self.best_exchange(most, least, costs) else {
                return;
            };
            self.apply(most, least, give, take, costs);
        }
    }

    /// What `most` should give, and what it should take for it if anything, so that the two loads come
    /// closest; None if nothing brings them closer. As places in the lists of the two.
    fn best_exchange(
        &self,
        most: usize,
        least: usize,
        costs: &[f64],
    ) -> Option<(usize, Option<usize>)> {
        let gap = self.loads[most] - self.loads[least];
        let cost_of = |rank: usize, place: usize| costs[self.items[rank][place]];
        let num_takes = self.items[least].len();
        // Both lists fall, so the place in the second never goes back.
        let mut take = 0;
        let mut best: Option<(f64, (usize, Option<usize>))> = None;
        for give in 0..self.items[most].len() {
            let given = cost_of(most, give);
            // The first for which at least half of the gap moves, and the one before it.
            while take < num_takes && given - cost_of(least, take) < gap / 2.0 {
                take += 1;
            }
            let before = take.checked_sub(1).map(Some);
            let after = Some((take < num_takes).then_some(take));
            for taken in [before, after].into_iter().flatten() {
                let moved = given - taken.map_or(0.0, |place| cost_of(least, place));
                let left = (gap - 2.0 * moved).abs();
                // Rounding must not pass for progress.
                let is_progress = moved > 0.0 && left < gap * (1.0 - 1e-9);
                if is_progress && best.is_none_or(|(least_left, _)| left < least_left) {
                    best = Some((left, (give, taken)));
                }
            }
        }
        best.map(|(_, exchange)| exchange)
    }

    fn apply(
        &mut self,
        most: usize,
        least: usize,
        give: usize,
        take: Option<usize>,
        costs: &[f64],
    ) {
        let given = self.items[most].remove(give);
        let taken = take.map(|place| self.items[least].remove(place));
        insert_falling(&mut self.items[least], given, costs);
        if let Some(taken) = taken {
            insert_falling(&mut self.items[most], taken, costs);
        }
        // Summed anew: adding and subtracting would let rounding errors grow.
        for rank in [most, least] {
            self.loads[rank] = self.items[rank].iter().map(|&item| costs[item]).sum();
        }
    }

    fn rank_of(&self, num_items: usize) -> Vec<usize> {
        let mut rank_of = vec![0; num_items];
        for (rank, items) in self.items.iter().enumerate() {
            for &item in items {
                rank_of[item] = rank;
            }
        }
        rank_of
    }
}

/// Inserts `item` where costs keep falling.
fn insert_falling(items: &mut Vec<usize>, item: usize, costs: &[f64]) {
    let place = items.partition_point(|&other| costs[other] >= costs[item]);
    items.insert(place, item);
}

/// Numbers the ranks anew, highest load first.
fn by_decreasing_load(rank_of: &[usize], costs: &[f64], num_ranks: usize) -> Vec<usize> {
    let mut loads = vec![0.0; num_ranks];
    for (&rank, cost) in rank_of.iter().zip(costs) {
        loads[rank] += cost;
    }
    let mut ranks: Vec<usize> = (0..num_ranks).collect();
    ranks.sort_by_key(|&rank| Reverse(Cost(loads[rank])));
    let mut place_of = vec![0; num_ranks];
    for (place, &rank) in ranks.iter().enumerate() {
        place_of[rank] = place;
    }
    rank_of.iter().map(|&rank| place_of[rank]).collect()
}
