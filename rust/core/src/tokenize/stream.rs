//! The text of a response while it is being sampled.

use std::sync::Arc;

use super::Encoder;
use super::stops::StopStrings;
use crate::error::{EncoderError, Error, Result};

/// Ids that are decoded again with each new one. What comes after them may depend on those before, on
/// whether there are any, for instance; but not on all.
const MAX_WINDOW: usize = 32;

/// Decodes ids one at a time, and gives text as soon as no later id can change it.
///
/// The pieces make up what the whole sequence decodes to, cut before the first stop string: the one
/// that ends first. What comes after a stop or [`finish`](Self::finish) is passed over.
pub struct DecodeStream {
    encoder: Arc<dyn Encoder>,
    skip_special_tokens: bool,
    stops: StopStrings,
    window: Window,
    num_pushed: usize,
    is_stopped: bool,
    is_finished: bool,
}

/// The last ids of the sequence, of which the first ones give context.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the ids' text that were given out.
    num_given: usize,
    /// Where the ids begin whose text was given out last.
    last_start: usize,
    /// Number of ids whose text was given out.
    num_final: usize,
    /// The ids' text, and whether a later id may change the end of it.
    text: String,
    is_open: bool,
}

impl DecodeStream {
    pub(super) fn new(
        encoder: Arc<dyn Encoder>,
        stops: Vec<String>,
        skip_special_tokens: bool,
    ) -> Result<Self> {
        Ok(Self {
            encoder,
            skip_special_tokens,
            stops: StopStrings::new(stops)?,
            window: Window::default(),
            num_pushed: 0,
            is_stopped: false,
            is_finished: false,
        })
    }

    /// The text that is final with `id`; often empty.
    ///
    /// An id that stands for no token is passed over, as in
    /// [`decode_batch`](super::TextCodec::decode_batch).
    pub fn push(&mut self, id: i32) -> Result<String> {
        let position = self.num_pushed;
        let id = u32::try_from(id).map_err(|_| Error::IdNegative { id, position })?;
        self.num_pushed += 1;
        if self.is_stopped || self.is_finished || !self.encoder.contains(id) {
            return Ok(String::new());
        }
        let piece = self
            .window
            .push(&*self.encoder, id, self.skip_special_tokens)
            .map_err(|source| Error::Decode {
                sequence_index: 0,
                source,
            })?;
        Ok(self.pass(&piece))
    }

    /// The rest of the text, of a sequence that ends here.
    pub fn finish(&mut self) -> String {
        if self.is_stopped || self.is_finished {
            return String::new();
        }
        self.is_finished = true;
        let mut text = self.pass(&self.window.rest());
        if !self.is_stopped {
            text.push_str(&self.stops.finish());
        }
        text
    }

    /// Whether a stop string came.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    fn pass(&mut self, piece: &str) -> String {
        let (text, is_stopped) = self.stops.push(piece);
        self.is_stopped = is_stopped;
        text
    }
}

impl Window {
    fn push(
        &mut self,
        encoder: &dyn Encoder,
        id: u32,
        skip_special_tokens: bool,
    ) -> std::result::Result<String, EncoderError> {
        self.ids.push(id);
        let text = encoder.decode(&self.ids, skip_special_tokens)?;
        // A special token that is skipped leaves the bytes of a character before it open.
        if text != self.text || encoder.is_byte(id) {
            self.is_open = encoder.is_byte(id) || text.ends_with(char::REPLACEMENT_CHARACTER);
        }
        self.text = text;
        if self.is_open {
            return Ok(String::new());
        }
        let piece = self.rest();
        if !piece.is_empty() {
            self.num_given = self.text.len();
            self.last_start = self.num_final;
            self.num_final = self.ids.len();
            self.shorten(encoder, skip_special_tokens)?;
        }
        Ok(piece)
    }

    /// The text that was not given out.
    fn rest(&self) -> String {
        self.text
            .get(self.num_given..)
            .unwrap_or_default()
            .to_owned()
    }

    /// Drops all ids before the last that gave text, if there are many.
    fn shorten(
        &mut self,
        encoder: &dyn Encoder,
        skip_special_tokens: bool,
    ) -> std::result::Result<(), EncoderError> {
        if self.ids.len() < MAX_WINDOW {
            return Ok(());
        }
        self.ids.drain(..self.last_start);
        self.text = encoder.decode(&self.ids, skip_special_tokens)?;
        self.last_start = 0;
        self.num_final = self.ids.len();
        self.num_given = self.text.len();
        Ok(())
    }
}
