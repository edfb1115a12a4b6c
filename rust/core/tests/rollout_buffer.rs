//! The rollout buffer and its sealed batches, from outside.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
#![expect(
    clippy::cast_precision_loss,
    reason = "ids and groups of a test are small"
)]

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use gad_fast_core::Error;
use gad_fast_core::rollout::{
    AdvantageOptions, FinishReason, Rollout, RolloutBatch, RolloutBuffer, Taken, group_advantages,
};
use proptest::prelude::*;

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(30);

fn rollout(prompt_ids: &[i32], response_ids: &[i32], weight_version: i64) -> Rollout {
    let logprobs = response_ids.iter().map(|&id| -(id as f32)).collect();
    Rollout {
        prompt_ids: prompt_ids.to_vec(),
        response_ids: response_ids.to_vec(),
        finish_reason: FinishReason::Stop,
        weight_version,
        streams: vec![("logprobs".to_owned(), logprobs)],
    }
}

fn buffer(group_size: i64, max_staleness: Option<i64>) -> RolloutBuffer {
    RolloutBuffer::new(group_size, vec!["logprobs".to_owned()], max_staleness).unwrap()
}

fn take(buffer: &RolloutBuffer, num_groups: i64, current_version: i64) -> RolloutBatch {
    match buffer.take(num_groups, current_version, NOW).unwrap() {
        Taken::Batch(batch) => batch,
        other => panic!("no batch: {other:?}"),
    }
}

fn is_timeout(taken: &Taken) -> bool {
    matches!(taken, Taken::TimedOut)
}

#[test]
fn rows_lie_end_to_end_in_the_order_in_which_groups_became_ready() {
    let buffer = buffer(2, None);
    buffer.push(7, rollout(&[1, 2], &[3], 0)).unwrap();
    buffer.push(8, rollout(&[5], &[6, 7], 1)).unwrap();
    buffer.push_teacher(7, vec![9, 9, 9]).unwrap();
    buffer.push(8, rollout(&[5], &[8], 1)).unwrap();
    buffer.push(7, rollout(&[1, 2], &[4, 4], 2)).unwrap();
    assert_eq!((buffer.num_ready(), buffer.num_rollouts()), (2, 4));

    let batch = take(&buffer, 2, 2);
    assert_eq!(batch.tokens(), [5, 6, 7, 5, 8, 1, 2, 3, 1, 2, 4, 4]);
    assert_eq!(batch.offsets(), [0, 3, 5, 8, 12]);
    assert_eq!(batch.prompt_lengths(), [1, 1, 2, 2]);
    assert_eq!(batch.response_offsets(), [0, 2, 3, 4, 6]);
    assert_eq!(batch.group_ids(), [8, 8, 7, 7]);
    assert_eq!(batch.weight_versions(), [1, 1, 0, 2]);
    assert_eq!(batch.finish_reasons(), [0, 0, 0, 0]);
    assert_eq!(
        batch.stream("logprobs").unwrap(),
        [-6., -7., -8., -3., -4., -4.]
    );
    assert_eq!(batch.teacher_tokens(), [9, 9, 9]);
    assert_eq!(batch.teacher_offsets(), [0, 0, 3]);
    assert_eq!(
        (batch.num_rows(), batch.num_groups(), batch.group_size()),
        (4, 2, 2)
    );
    assert_eq!((buffer.num_ready(), buffer.num_rollouts()), (0, 0));
}

#[test]
fn too_few_ready_groups_stay_in_the_buffer() {
    let buffer = buffer(1, None);
    buffer.push(0, rollout(&[1], &[1], 0)).unwrap();
    assert!(is_timeout(&buffer.take(2, 0, NOW).unwrap()));
    assert_eq!(take(&buffer, 1, 0).num_rows(), 1);
}

#[test]
fn a_group_number_is_free_again_once_the_group_is_taken() {
    let buffer = buffer(1, None);
    for token in 1..4 {
        buffer.push(0, rollout(&[1], &[token], 0)).unwrap();
        assert!(matches!(
            buffer.push(0, rollout(&[1], &[9], 0)).unwrap_err(),
            Error::GroupFull {
                group_id: 0,
                group_size: 1
            }
        ));
        assert_eq!(take(&buffer, 1, 0).tokens(), [1, token]);
    }
}

#[test]
fn a_group_is_dropped_when_its_oldest_rollout_is_too_old() {
    let buffer = buffer(2, Some(1));
    for (group_id, versions) in [(0, [0, 2]), (1, [1, 2]), (2, [2, 2])] {
        for version in versions {
            buffer.push(group_id, rollout(&[1], &[1], version)).unwrap();
        }
    }
    assert_eq!(take(&buffer, 1, 2).group_ids(), [1, 1]);
    assert_eq!((buffer.num_dropped(), buffer.num_rollouts()), (1, 2));
    assert!(is_timeout(&buffer.take(1, 4, NOW).unwrap()));
    assert_eq!((buffer.num_dropped(), buffer.num_rollouts()), (2, 0));
}

#[test]
fn versions_at_both_ends_of_64_bits_have_an_age() {
    let buffer = buffer(1, Some(i64::MAX));
    buffer.push(0, rollout(&[1], &[1], i64::MIN)).unwrap();
    buffer.push(1, rollout(&[1], &[1], i64::MAX)).unwrap();
    assert_eq!(take(&buffer, 1, i64::MAX).group_ids(), [1]);
    assert_eq!(buffer.num_dropped(), 1);
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_no_trace() {
    let buffer = buffer(2, None);
    buffer.push(0, rollout(&[1, 2], &[3], 0)).unwrap();

    let mut unknown = rollout(&[1], &[1], 0);
    unknown.streams.push(("values".to_owned(), vec![0.0]));
    let mut missing = rollout(&[1], &[1], 0);
    missing.streams.clear();
    let mut repeated = rollout(&[1], &[1], 0);
    repeated.streams.push(repeated.streams[0].clone());
    let mut short = rollout(&[1], &[1, 2], 0);
    short.streams[0].1.pop();
    for (wrong, message) in [
        (unknown, "unknown stream \"values\""),
        (missing, "stream \"logprobs\" is missing"),
        (repeated, "different names, got \"logprobs\" twice"),
        (
            short,
            "logprobs must have one entry for each response id, 2, got 1",
        ),
        (
            rollout(&[], &[1], 0),
            "prompt_ids must hold at least one id",
        ),
        (
            rollout(&[1], &[], 0),
            "response_ids must hold at least one id",
        ),
        (
            rollout(&[1, -5], &[1], 0),
            "prompt_ids[1] must be at least 0, got -5",
        ),
        (
            rollout(&[1], &[i32::MIN], 0),
            "response_ids[0] must be at least 0",
        ),
        (rollout(&[1, 3], &[1], 0), "prompt_ids differ"),
    ] {
        let error = buffer.push(0, wrong).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    assert_eq!((buffer.num_ready(), buffer.num_rollouts()), (0, 1));
    assert!(buffer.push_teacher(0, vec![]).is_err());
    assert!(buffer.push_teacher(0, vec![-1]).is_err());
    buffer.push_teacher(0, vec![1]).unwrap();
    assert!(buffer.push_teacher(0, vec![1]).is_err());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    assert!(RolloutBuffer::new(0, vec![], None).is_err());
    assert!(RolloutBuffer::new(1, vec![], Some(-1)).is_err());
    assert!(RolloutBuffer::new(1, vec!["a".to_owned(), "a".to_owned()], None).is_err());
    assert!(buffer(1, None).take(0, 0, NOW).is_err());
    assert!(FinishReason::from_code(2).is_err());
}

#[test]
fn closing_ends_every_wait_and_refuses_rollouts() {
    let buffer = buffer(1, None);
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| buffer.take(1, 0, Duration::MAX).unwrap()))
            .collect();
        buffer.close();
        for waiter in waiters {
            assert!(matches!(waiter.join().unwrap(), Taken::Closed));
        }
    });
    assert!(buffer.is_closed());
    let error = buffer.push(0, rollout(&[1], &[1], 0)).unwrap_err();
    assert!(matches!(error, Error::BufferClosed));
}

#[test]
fn ready_groups_can_be_taken_from_a_closed_buffer() {
    let buffer = buffer(1, None);
    buffer.push(3, rollout(&[1], &[1], 0)).unwrap();
    buffer.close();
    assert_eq!(take(&buffer, 1, 0).group_ids(), [3]);
    assert!(matches!(buffer.take(1, 0, LONG).unwrap(), Taken::Closed));
}

#[test]
fn many_threads_push_while_others_take_and_nothing_is_lost() {
    const NUM_GROUPS: i64 = 60;
    let buffer = buffer(4, None);
    let start = Barrier::new(6);
    let mut group_ids = thread::scope(|scope| {
        for member in 0..4 {
            let (buffer, start) = (&buffer, &start);
            scope.spawn(move || {
                start.wait();
                for group_id in 0..NUM_GROUPS {
                    let prompt = i32::try_from(group_id).unwrap();
                    buffer
                        .push(group_id, rollout(&[prompt], &[prompt, member], 0))
                        .unwrap();
                }
            });
        }
        let takers = [(); 2].map(|()| {
            scope.spawn(|| {
                start.wait();
                let mut group_ids = Vec::new();
                for _ in 0..NUM_GROUPS / 2 / 3 {
                    let Taken::Batch(batch) = buffer.take(3, 0, LONG).unwrap() else {
                        panic!("nothing in time");
                    };
                    for row in batch.tokens().chunks(3) {
                        assert_eq!(row[0], row[1]);
                    }
                    group_ids.extend_from_slice(batch.group_ids());
                }
                group_ids
            })
        });
        takers.map(|taker| taker.join().unwrap()).concat()
    });
    group_ids.sort_unstable();
    let expected: Vec<i64> = (0..NUM_GROUPS).flat_map(|id| [id; 4]).collect();
    assert_eq!(group_ids, expected);
    assert_eq!(buffer.num_rollouts(), 0);
}

fn batch_of(num_groups: i64, group_size: i64) -> RolloutBatch {
    let buffer = buffer(group_size, None);
    for group_id in 0..num_groups {
        for member in 0..group_size {
            let prompt = vec![1; 1 + usize::try_from(group_id).unwrap()];
            let response = vec![2; 1 + usize::try_from(member).unwrap()];
            buffer
                .push(group_id, rollout(&prompt, &response, 0))
                .unwrap();
        }
    }
    take(&buffer, num_groups, 0)
}

const STANDARD: AdvantageOptions = AdvantageOptions {
    is_scaled: true,
    leave_one_out: false,
    std_floor: 0.0,
    eps: 0.0,
};

#[test]
fn scores_make_a_new_batch_that_shares_the_rows() {
    let batch = batch_of(1, 3);
    assert!(matches!(
        batch.advantages(&STANDARD),
        Err(Error::RewardsMissing)
    ));
    let scored = batch.with_scores(vec![1.0, 2.0, 3.0], None).unwrap();
    assert_eq!(scored.tokens().as_ptr(), batch.tokens().as_ptr());
    assert_eq!(batch.scores(), None);
    assert_eq!(scored.rewards(), Some([1.0, 2.0, 3.0].as_slice()));
    assert_eq!(scored.advantages(&STANDARD).unwrap(), [-1.0, 0.0, 1.0]);
    let shaped = batch
        .with_scores(vec![1.0; 3], Some(vec![0.0, 0.0, 3.0]))
        .unwrap();
    assert_eq!(shaped.scores(), Some([1.0; 3].as_slice()));
    assert_eq!(shaped.rewards(), Some([0.0, 0.0, 3.0].as_slice()));
    assert!(batch.with_scores(vec![1.0; 2], None).is_err());
    assert!(batch.with_scores(vec![1.0, f32::NAN, 1.0], None).is_err());
    assert!(
        batch
            .with_scores(vec![1.0; 3], Some(vec![f32::INFINITY; 3]))
            .is_err()
    );
}

#[test]
fn equal_rewards_have_advantages_of_exactly_zero() {
    // The mean of three times 0.1 is not 0.1.
    for reward in [0.1, -1e30, f32::MAX, 1e-45] {
        for eps in [0.0, 1e-320, 1e-6] {
            let options = AdvantageOptions { eps, ..STANDARD };
            assert_eq!(
                group_advantages(&[reward; 6], 3, &options).unwrap(),
                [0.0; 6]
            );
        }
    }
    assert_eq!(
        group_advantages(&[5.0, 7.0], 1, &STANDARD).unwrap(),
        [0.0; 2]
    );
}

#[test]
fn a_floor_bounds_the_scale_and_a_rollout_may_be_left_out_of_its_mean() {
    let floor = AdvantageOptions {
        std_floor: 4.0,
        ..STANDARD
    };
    assert_eq!(
        group_advantages(&[1.0, 2.0, 3.0], 3, &floor).unwrap(),
        [-0.25, 0.0, 0.25]
    );
    let rloo = AdvantageOptions {
        is_scaled: false,
        leave_one_out: true,
        ..STANDARD
    };
    assert_eq!(
        group_advantages(&[1.0, 2.0, 6.0], 3, &rloo).unwrap(),
        [-3.0, -1.5, 4.5]
    );
    let negative = AdvantageOptions {
        eps: -1.0,
        ..STANDARD
    };
    assert!(group_advantages(&[1.0], 1, &negative).is_err());
}

#[test]
fn gathered_rows_are_those_of_the_batch() {
    let batch = batch_of(2, 2)
        .with_scores(vec![1.0, 2.0, 3.0, 4.0], None)
        .unwrap();
    let rows = batch.gather(&[3, 0]).unwrap();
    assert_eq!(rows.tokens, [1, 1, 2, 2, 1, 2]);
    assert_eq!(rows.position_ids, [0, 1, 2, 3, 0, 1]);
    assert_eq!(rows.response_mask, [false, false, true, true, false, true]);
    assert_eq!(rows.cu_seqlens, [0, 4, 6]);
    let logprobs = batch.gather_stream("logprobs", &[3, 0]).unwrap();
    assert_eq!(logprobs, [0.0, 0.0, -2.0, -2.0, 0.0, -2.0]);
    let spread = batch.spread(batch.rewards().unwrap(), &[3, 0]).unwrap();
    assert_eq!(spread, [0.0, 0.0, 4.0, 4.0, 0.0, 1.0]);

    assert!(batch.gather(&[]).unwrap().tokens.is_empty());
    for wrong in [-1, 4, i64::MAX] {
        assert!(batch.gather(&[0, wrong]).is_err());
    }
    assert!(batch.gather_stream("values", &[0]).is_err());
    assert!(batch.spread(&[1.0], &[0]).is_err());
}

#[test]
fn gathered_groups_lie_as_their_layout_says() {
    let buffer = buffer(2, None);
    for (group_id, prompt) in [(0, [1, 2].as_slice()), (1, &[3])] {
        buffer.push(group_id, rollout(prompt, &[4], 0)).unwrap();
        buffer.push(group_id, rollout(prompt, &[5, 6], 0)).unwrap();
    }
    buffer.push_teacher(0, vec![7, 8]).unwrap();
    let batch = take(&buffer, 2, 0);
    assert_eq!(
        batch.gather_groups(&[1, 0]).unwrap(),
        [3, 4, 5, 6, 1, 2, 4, 5, 6, 7, 8]
    );
    assert!(batch.gather_groups(&[]).unwrap().is_empty());
    for wrong in [-1, 2] {
        assert!(batch.gather_groups(&[wrong]).is_err());
    }
}

proptest! {
    #[test]
    fn advantages_are_those_of_the_formula(
        rewards in prop::collection::vec(-100.0_f32..100.0, 12),
        group_size in prop::sample::select(vec![2_usize, 3, 4, 6, 12]),
        is_scaled: bool,
        leave_one_out: bool,
        std_floor in 0.0..3.0,
    ) {
        let options = AdvantageOptions { is_scaled, leave_one_out, std_floor, eps: 1e-6 };
        let advantages = group_advantages(&rewards, group_size, &options).unwrap();
        let count = group_size as f64;
        for (group, found) in rewards.chunks(group_size).zip(advantages.chunks(group_size)) {
            let group: Vec<f64> = group.iter().map(|&reward| reward.into()).collect();
            let sum: f64 = group.iter().sum();
            let mean = sum / count;
            let squares: f64 = group.iter().map(|r| (r - mean).powi(2)).sum();
            let divisor = (squares / (count - 1.0)).sqrt().max(std_floor) + 1e-6;
            for (reward, &advantage) in group.iter().zip(found) {
                let baseline = if leave_one_out { (sum - reward) / (count - 1.0) } else { mean };
                let expected = (reward - baseline) / if is_scaled { divisor } else { 1.0 };
                // One rounding to 32 bits, and those of the sums in 64.
                let tolerance = expected.abs() * 1e-7 + 1e-9;
                prop_assert!((f64::from(advantage) - expected).abs() <= tolerance);
            }
        }
    }
}
