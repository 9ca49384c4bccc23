//! The size of a window, from the number of ranks.

use crate::error::{Error, Result};
use crate::partial::epoch::{MAX_PAYLOAD, MAX_WINDOWS, SLOTS};
use crate::partial::view::window;

/// Bytes of a word.
pub(super) const WORD: u64 = 8;
/// Bytes of payload that a word carries beside its epoch.
pub(super) const PAYLOAD: usize = 4;

/// Most payload of a rank in one exchange of `world` ranks, bytes. It keeps windows within [`MAX_WINDOWS`]: a window has a
/// slot for every rank and one for merged rows, each once a parity, and half of a word is payload.
pub(super) fn capacity(world: usize) -> usize {
    (MAX_WINDOWS / (SLOTS * (world + 1) * (WORD as usize / PAYLOAD))).min(MAX_PAYLOAD) / 64 * 64
}

/// Words of a slot in windows of `world` ranks.
pub(super) fn slot_words(world: usize) -> u64 {
    window::HEADER_WORDS + (capacity(world) / PAYLOAD) as u64
}

/// Bytes of a window of `world` ranks.
pub(super) fn window_bytes(world: usize) -> usize {
    ((window::CONTROL_WORDS + (SLOTS * (world + 1)) as u64 * slot_words(world)) * WORD) as usize
}

/// `Unsupported` where there are more ranks than a kernel serves.
pub(super) fn check_world(world: usize) -> Result<()> {
    if world <= window::MAX_RANKS {
        return Ok(());
    }
    let wanted = format!("at most {} ranks that exchange on GPUs", window::MAX_RANKS);
    Err(Error::unsupported("n", world, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_keep_their_size() {
        assert_eq!((capacity(2), capacity(15)), (1 << 20, 1 << 20));
        for world in 2..=window::MAX_RANKS {
            let slot = window::HEADER_WORDS as usize + capacity(world) / PAYLOAD;
            let bytes = (window::CONTROL_WORDS as usize + SLOTS * (world + 1) * slot) * WORD as usize;
            assert_eq!(window_bytes(world), bytes);
            assert!(bytes <= MAX_WINDOWS + (1 << 16), "{world} ranks: {bytes}");
            assert!(capacity(world) >= 240 << 10, "{world} ranks: {}", capacity(world));
        }
        assert!(check_world(window::MAX_RANKS).is_ok() && check_world(window::MAX_RANKS + 1).is_err());
    }
}
