//! Responses as a student leaves them: closed by the end token, or cut at a limit.

use super::batch::TokenBatch;

impl TokenBatch {
    /// Closes every sequence with `end_id`, and cuts it after its first one or after `max_tokens`, whichever
    /// comes first; whether each ends with its end token.
    #[must_use]
    pub fn into_responses(self, end_id: i32, max_tokens: usize) -> (Self, Vec<bool>) {
        let num_sequences = self.offsets.len() - 1;
        let mut responses = Self::with_capacity(num_sequences, self.ids.len() + num_sequences);
        let mut is_finished = Vec::with_capacity(num_sequences);
        for ids in self.sequences() {
            let kept = &ids[..ids.len().min(max_tokens)];
            let end = kept.iter().position(|&id| id == end_id);
            responses
                .ids
                .extend_from_slice(&kept[..end.unwrap_or(kept.len())]);
            let has_room = end.is_some() || ids.len() < max_tokens;
            if has_room {
                responses.ids.push(end_id);
            }
            responses.end_sequence();
            is_finished.push(has_room);
        }
        (responses, is_finished)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "offsets are positions in `ids`"
    )]
    fn sequences(&self) -> impl Iterator<Item = &[i32]> {
        self.offsets
            .windows(2)
            .map(|pair| &self.ids[pair[0] as usize..pair[1] as usize])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const END: i32 = 0;

    fn batch(texts: &[Vec<i32>]) -> TokenBatch {
        let mut batch = TokenBatch::with_capacity(texts.len(), 0);
        for ids in texts {
            batch.ids.extend(ids);
            batch.end_sequence();
        }
        batch
    }

    /// Word for word: append the end, cut at the limit, cut after the first end.
    fn expected(mut ids: Vec<i32>, max_tokens: usize) -> (Vec<i32>, bool) {
        ids.push(END);
        ids.truncate(max_tokens);
        let end = ids.iter().position(|&id| id == END);
        if let Some(end) = end {
            ids.truncate(end + 1);
        }
        (ids, end.is_some())
    }

    #[test]
    fn a_response_of_just_the_limit_has_no_room_for_its_end() {
        let (responses, is_finished) =
            batch(&[vec![1, 2], vec![1, 2, 3], vec![]]).into_responses(END, 3);
        assert_eq!(responses.ids, [1, 2, END, 1, 2, 3, END]);
        assert_eq!(responses.offsets, [0, 3, 6, 7]);
        assert_eq!(is_finished, [true, false, true]);
    }

    proptest! {
        #[test]
        fn responses_are_cut_as_defined(
            texts in prop::collection::vec(prop::collection::vec(0..4_i32, 0..9), 0..9),
            max_tokens in 0..12_usize,
        ) {
            let (responses, is_finished) = batch(&texts).into_responses(END, max_tokens);
            let found: Vec<_> = responses
                .sequences()
                .map(<[i32]>::to_vec)
                .zip(is_finished)
                .collect();
            let expected: Vec<_> = texts.into_iter().map(|ids| expected(ids, max_tokens)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
