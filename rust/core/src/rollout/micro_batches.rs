//! Which rollouts share a forward pass.
//!
//! A micro-batch is one rectangle: prompts are padded on the left to the longest prompt in it, responses
//! on the right to the longest response. The planner packs groups of rows into few rectangles with little
//! padding, none of them larger than the budget.

use std::cmp::Reverse;
use std::iter::successors;

use crate::error::{Error, Result};

/// Micro-batches that an item may still join: the most recent ones.
///
/// It bounds the time to a constant an item. Older micro-batches are mostly full, and their lengths are
/// further from those of the items to come.
const NUM_OPEN: usize = 16;

/// Rows that must stay in one micro-batch, for example a prompt's responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatchItem {
    /// Number of sequences.
    pub rows: u64,
    /// Tokens of the longest prompt among them.
    pub prompt_length: u64,
    /// Tokens of the longest response among them.
    pub response_length: u64,
}

/// The rectangle that covers the items of a micro-batch.
///
/// Sizes have 128 bits and saturate there, which is over every budget.
#[derive(Clone, Copy)]
struct Rectangle {
    rows: u128,
    prompt_length: u128,
    response_length: u128,
}

impl From<MicroBatchItem> for Rectangle {
    fn from(item: MicroBatchItem) -> Self {
        Self {
            rows: item.rows.into(),
            prompt_length: item.prompt_length.into(),
            response_length: item.response_length.into(),
        }
    }
}

impl Rectangle {
    /// Tokens, padding included.
    fn area(self) -> u128 {
        self.rows
            .saturating_mul(self.prompt_length + self.response_length)
    }

    /// The rectangle around both.
    fn union(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            prompt_length: self.prompt_length.max(other.prompt_length),
            response_length: self.response_length.max(other.response_length),
        }
    }
}

struct MicroBatch {
    rectangle: Rectangle,
    indices: Vec<usize>,
}

/// Distributes `items` over micro-batches of at most `token_budget` tokens, padding included.
///
/// Gives the indices of the items of each micro-batch; every index comes exactly once, and the plan is
/// the same on every machine. The largest micro-batches come first, so that a budget too large for the
/// device fails in the first forward pass. An item that is over the budget alone has a micro-batch for
/// itself: it costs memory, dropping it would change the loss.
///
/// A rectangle wastes little if both lengths are alike in it. So the items are laid out on shelves of
/// similar response length, by prompt length on each, and packed in this order. Few shelves favour
/// prompts, many favour responses; the plan with the fewest tokens is kept.
pub fn plan_micro_batches(items: &[MicroBatchItem], token_budget: u64) -> Result<Vec<Vec<usize>>> {
    if token_budget == 0 {
        return Err(Error::TokenBudgetTooSmall { token_budget: 0 });
    }
    let shelf_counts =
        successors(Some(1), |count| Some(count * 2)).take_while(|&count| count < 2 * items.len());
    let mut batches = shelf_counts
        .map(|num_shelves| pack(items, &lay_on_shelves(items, num_shelves), token_budget))
        .min_by_key(|batches| {
            let area = |batch: &MicroBatch| batch.rectangle.area();
            let num_tokens = batches.iter().map(area).fold(0, u128::saturating_add);
            (num_tokens, batches.len())
        })
        .unwrap_or_default();
    batches.sort_by_key(|batch| Reverse(batch.rectangle.area()));
    Ok(batches.into_iter().map(|batch| batch.indices).collect())
}

/// The indices of `items` in an order in which neighbours are alike.
///
/// Longest responses first. Every second shelf runs from short prompts to long ones, so that prompts are
/// alike where one shelf ends and the next begins.
fn lay_on_shelves(items: &[MicroBatchItem], num_shelves: usize) -> Vec<usize> {
    let by_response =
        |&index: &usize| Reverse((items[index].response_length, items[index].prompt_length));
    let by_prompt =
        |&index: &usize| Reverse((items[index].prompt_length, items[index].response_length));

    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(by_response);
    let shelf_length = items.len().div_ceil(num_shelves).max(1);
    for (shelf_index, shelf) in order.chunks_mut(shelf_length).enumerate() {
        shelf.sort_by_key(by_prompt);
        if shelf_index % 2 == 1 {
            shelf.reverse();
        }
    }
    order
}

/// Packs `items` in `order`: each joins the open micro-batch in which it adds the fewest tokens, and
/// opens one if it fits in none.
fn pack(items: &[MicroBatchItem], order: &[usize], token_budget: u64) -> Vec<MicroBatch> {
    let mut batches: Vec<MicroBatch> = Vec::new();
    for &index in order {
        let item = Rectangle::from(items[index]);
        let first_open = batches.len().saturating_sub(NUM_OPEN);
        let best = batches[first_open..]
            .iter_mut()
            .rev()
            .filter(|batch| batch.rectangle.union(item).area() <= token_budget.into())
            .min_by_key(|batch| batch.rectangle.union(item).area() - batch.rectangle.area());
        match best {
            Some(batch) => {
                batch.rectangle = batch.rectangle.union(item);
                batch.indices.push(index);
            }
            None => batches.push(MicroBatch {
                rectangle: item,
                indices: vec![index],
            }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use proptest::prelude::*;

    use super::*;

    fn item(rows: u64, prompt_length: u64, response_length: u64) -> MicroBatchItem {
        MicroBatchItem {
            rows,
            prompt_length,
            response_length,
        }
    }

    fn area(items: &[MicroBatchItem], indices: &[usize]) -> u128 {
        indices
            .iter()
            .map(|&index| Rectangle::from(items[index]))
            .reduce(Rectangle::union)
            .map_or(0, Rectangle::area)
    }

    #[test]
    fn no_items_make_no_micro_batches() {
        assert!(plan_micro_batches(&[], 1).unwrap().is_empty());
    }

    #[test]
    fn a_budget_of_zero_is_an_error() {
        let error = plan_micro_batches(&[item(1, 1, 1)], 0).unwrap_err();
        assert!(matches!(
            error,
            Error::TokenBudgetTooSmall { token_budget: 0 }
        ));
    }

    #[test]
    fn items_of_one_width_fill_the_budget_to_the_last_token() {
        let items = [item(2, 3, 7); 5];
        let batches = plan_micro_batches(&items, 40).unwrap();
        assert_eq!(batches, [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn the_width_is_that_of_the_longest_prompt_and_the_longest_response() {
        // 12 tokens each, but 2 * (10 + 10) together.
        let items = [item(1, 10, 2), item(1, 2, 10)];
        assert_eq!(plan_micro_batches(&items, 39).unwrap().len(), 2);
        assert_eq!(plan_micro_batches(&items, 40).unwrap().len(), 1);
    }

    #[test]
    fn an_item_over_the_budget_is_alone_and_first() {
        let items = [item(1, 1, 1), item(4, 50, 50), item(1, 1, 1)];
        assert_eq!(
            plan_micro_batches(&items, 10).unwrap(),
            [vec![1], vec![0, 2]]
        );
    }

    #[test]
    fn short_items_do_not_pay_for_long_ones_while_a_narrow_micro_batch_is_open() {
        let items = [item(1, 50, 50), item(9, 5, 5), item(1, 5, 5)];
        assert_eq!(
            plan_micro_batches(&items, 200).unwrap(),
            [vec![0], vec![1, 2]]
        );
    }

    #[test]
    fn items_that_are_alike_in_both_lengths_share_a_micro_batch() {
        // All of one total length; a rectangle around both kinds would be nearly twice as wide.
        let items: Vec<_> = (0..8)
            .map(|index| [item(1, 10, 90), item(1, 90, 10)][index % 2])
            .collect();
        assert_eq!(
            plan_micro_batches(&items, 400).unwrap(),
            [[1, 3, 5, 7], [0, 2, 4, 6]]
        );
    }

    #[test]
    fn lengths_near_the_limit_of_64_bits_do_not_overflow() {
        let items = [item(u64::MAX, u64::MAX, u64::MAX); 2];
        assert_eq!(
            plan_micro_batches(&items, u64::MAX).unwrap(),
            [vec![0], vec![1]]
        );
    }

    fn items() -> impl Strategy<Value = Vec<MicroBatchItem>> {
        let small = (0_u64..9, 0_u64..200, 0_u64..200);
        let huge = (any::<u64>(), any::<u64>(), any::<u64>());
        let one = prop_oneof![9 => small, 1 => huge];
        prop::collection::vec(
            one.prop_map(|(rows, prompt, response)| item(rows, prompt, response)),
            0..300,
        )
    }

    proptest! {
        #[test]
        fn every_index_comes_exactly_once(items in items(), token_budget in 1_u64..5_000) {
            let batches = plan_micro_batches(&items, token_budget).unwrap();
            prop_assert!(batches.iter().all(|batch| !batch.is_empty()));
            let mut indices = batches.concat();
            indices.sort_unstable();
            prop_assert_eq!(indices, (0..items.len()).collect::<Vec<_>>());
        }

        #[test]
        fn only_a_single_item_is_over_the_budget(items in items(), token_budget in 1_u64..5_000) {
            for batch in plan_micro_batches(&items, token_budget).unwrap() {
                prop_assert!(batch.len() == 1 || area(&items, &batch) <= token_budget.into());
            }
        }

        #[test]
        fn the_plan_does_not_depend_on_chance(items in items(), token_budget in 1_u64..5_000) {
            prop_assert_eq!(
                plan_micro_batches(&items, token_budget).unwrap(),
                plan_micro_batches(&items, token_budget).unwrap()
            );
        }
    }
}
