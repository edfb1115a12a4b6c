//! Stop strings in a text that comes in pieces.

use crate::error::{Error, Result};

/// Passes a text through up to the first stop string in it.
///
/// The first is the one that ends first, and among those that end together the longest: so the place of
/// the pieces' borders makes no difference.
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// What came last and may yet be the start of a stop string.
    held: String,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>) -> Result<Self> {
        if let Some(stop_index) = stops.iter().position(String::is_empty) {
            return Err(Error::StopEmpty { stop_index });
        }
        Ok(Self {
            stops,
            held: String::new(),
        })
    }

    /// What is final once `piece` came, and whether it ends before a stop string.
    pub(super) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let stop = self.first_stop();
        let end = stop.unwrap_or_else(|| self.held.len() - self.num_undecided());
        let rest = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, rest);
        if stop.is_some() {
            self.held.clear();
        }
        (text, stop.is_some())
    }

    /// What is left once the text has ended.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the first stop string starts.
    fn first_stop(&self) -> Option<usize> {
        let places = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start))
        });
        places.min().map(|(_, start)| start)
    }

    /// Length of the longest end of the text with which a stop string starts.
    fn num_undecided(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        (first..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .map(|start| &self.held[start..])
            .find(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
            .map_or(0, str::len)
    }
}
