//! Which keys of a tile the rows of a split see.

use super::kernel::args::TILE;
use super::mask::{MaskBits, look};
use super::partition::Split;
use super::sequences::{Reader, Sequence};

/// Which keys of a tile the rows of a split see.
pub struct Seen {
    /// One a row of the split: bit t is key t of the tile.
    masks: [u64; TILE],
    /// Keys from the tile's first on that all rows see, where they see these and no others.
    pub prefix: Option<usize>,
    /// Whether any row sees any key.
    pub any: bool,
    /// Whether a mask adds something to a score that is seen.
    pub adds: bool,
}

impl Seen {
    /// Nothing.
    pub const NONE: Seen = Seen { masks: [0; TILE], prefix: None, any: false, adds: false };

    /// Looks at the `keys` keys from slot `slot` on. Masks and lists that heads have of their own need a split of one kv head.
    ///
    /// # Safety
    /// `sequence` is what the reader filled for the split's sequence, which holds these slots.
    pub unsafe fn look(
        &mut self,
        reader: &Reader<'_>,
        split: &Split,
        sequence: &Sequence,
        group: usize,
        slot: usize,
        keys: usize,
    ) {
        self.adds = false;
        let mask = reader.step().mask;
        let by_head = mask.is_some_and(|mask| mask.is_by_head());
        let (mut union, mut r) = (0, 0);
        while r < split.rows {
            let (token, g) = ((split.first_row + r) / group, (split.first_row + r) % group);
            let rows = (group - g).min(split.rows - r);
            let mut visible = reader.visible((split.sequence, split.first_head), sequence, token, slot, keys);
            if let Some(mask) = mask.filter(|_| !by_head && visible != 0) {
                // SAFETY: the sequence holds these keys, and the reader gave it none beyond what the mask has room for with its
                // query tokens; `Reader::new` was promised that the mask stays readable.
                let MaskBits { visible: bits, adds } = unsafe { look(&mask, split.sequence, 0, token, slot, keys) };
                visible &= bits;
                self.adds |= adds;
            }
            self.masks[r..r + rows].fill(visible);
            if let Some(mask) = mask.filter(|_| by_head && visible != 0) {
                for i in 0..rows {
                    let head = split.first_head * group + g + i;
                    // SAFETY: as above, for a query head of the split's kv head.
                    let bits = unsafe { look(&mask, split.sequence, head, token, slot, keys) };
                    self.masks[r + i] &= bits.visible;
                    self.adds |= bits.adds;
                }
            }
            union = self.masks[r..r + rows].iter().fold(union, |union, mask| union | mask);
            r += rows;
        }
        let is_prefix = union & union.wrapping_add(1) == 0 && self.masks[..split.rows].iter().all(|&m| m == union);
        self.prefix = is_prefix.then_some(union.count_ones() as usize);
        self.any = union != 0;
    }

    /// The mask of row `r` of the split.
    pub fn mask(&self, r: usize) -> u64 {
        self.masks[r]
    }
}
