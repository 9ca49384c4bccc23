//! Which keys of a tile the query tokens of a split see.

use super::kernel::args::TILE;
use super::partition::Split;
use super::sequences::{Reader, Sequence};

/// Which keys of a tile the query tokens of a split see.
pub struct Seen {
    /// One mask a query token of the split: bit t is key t of the tile.
    masks: [u64; TILE],
    /// The first query token of the split, and query heads of a kv head.
    first_token: usize,
    group: usize,
    /// Keys from the tile's first on that all tokens see, where they see these and no others.
    pub prefix: Option<usize>,
    /// Whether any token sees any key.
    pub any: bool,
}

impl Seen {
    /// Of the `keys` keys from slot `slot` on.
    pub fn of(reader: &Reader<'_>, split: &Split, sequence: &Sequence, group: usize, slot: usize, keys: usize) -> Seen {
        let (first, last) = (split.first_row / group, (split.first_row + split.rows - 1) / group);
        let mut seen = Seen { masks: [0; TILE], first_token: first, group, prefix: None, any: false };
        let masks = &mut seen.masks[..last - first + 1];
        let mut union = 0;
        for (i, mask) in masks.iter_mut().enumerate() {
            *mask = reader.visible(split.sequence, sequence, first + i, slot, keys);
            union |= *mask;
        }
        let is_prefix = union & union.wrapping_add(1) == 0 && masks.iter().all(|&mask| mask == union);
        seen.prefix = is_prefix.then_some(union.count_ones() as usize);
        seen.any = union != 0;
        seen
    }

    /// The mask of row `row` of the sequence (query token * group + query head of the group).
    pub fn mask(&self, row: usize) -> u64 {
        self.masks[row / self.group - self.first_token]
    }
}
