//! The flat partition: all work of a step in one line, cut into equal slices, one a worker. Where splits begin and end, and
//! the order in which they are merged, is decided here and nowhere else.
//!
//! The line runs over sequences, then row blocks (query token x query head of the group), then blocks of kv heads, then
//! tiles of keys that some query token can see; one kv head of one tile counts 1. A border falls between tiles. An *item*
//! is one row block of one block of kv heads; a *split* is the part of an item that one worker has. Inside a split, leaves
//! of [`leaf`] keys are merged in order; splits of an item are merged in the order of the workers. Merged sums are kept in
//! two parts (`sums`), so that the order costs no accuracy at any length.

use super::kernel::args::{TILE, register_keys};
use super::sequences::Sequence;

/// Keys of a leaf: how many add up before they are closed into the sums of their split, given the keys and rows of the
/// split. Rounding averages out over leaves, so few keys are cut finer; and equal keys have equal errors, the more of
/// them the shorter the runs of keys that are summed in registers.
pub fn leaf(keys: usize, rows: usize) -> usize {
    match keys {
        ..=64 => 4,
        65..=512 => 64,
        _ => 16 * register_keys(rows),
    }
}

/// How a step's work is laid out and cut.
#[derive(Clone, Copy, Debug)]
pub struct Partition<'a> {
    /// The sequences, with their begins.
    pub sequences: &'a [Sequence],
    /// Length of the line.
    pub total: u64,
    /// Workers.
    pub workers: usize,
    /// kv heads.
    pub heads: usize,
    /// kv heads of a block.
    pub head_block: usize,
    /// Query heads of a kv head.
    pub group: usize,
    /// Most rows of a row block.
    pub row_block: usize,
}

/// A border between tiles on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Border {
    /// The sequence; their number at the line's end.
    pub sequence: usize,
    /// The row block.
    pub rows: usize,
    /// The block of kv heads.
    pub heads: usize,
    /// The tile that follows, counted from the item's first.
    pub tile: usize,
}

impl Border {
    fn same_item(&self, other: &Border) -> bool {
        (self.sequence, self.rows, self.heads) == (other.sequence, other.rows, other.heads)
    }
}

/// Part of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// The sequence.
    pub sequence: usize,
    /// First row of the sequence's rows (query token * group + query head of the group).
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// First kv head.
    pub first_head: usize,
    /// kv heads.
    pub heads: usize,
    /// First tile, counted from the sequence's slot 0.
    pub begin: usize,
    /// The tile after the last.
    pub end: usize,
    /// Whether it has the item's first tile.
    pub is_first: bool,
    /// Whether it has the item's last tile.
    pub is_last: bool,
}

impl Split {
    /// Whether this is all of the item.
    pub fn is_whole(&self) -> bool {
        self.is_first && self.is_last
    }
}

/// Tiles of an item of the sequence.
fn tiles(sequence: &Sequence) -> usize {
    sequence.visible.tiles(TILE).len()
}

impl Partition<'_> {
    /// Sets the begins of the sequences and gives the length of the line.
    pub fn measure(sequences: &mut [Sequence], heads: usize, group: usize, row_block: usize) -> u64 {
        let mut total = 0u64;
        for sequence in sequences {
            sequence.begin = total;
            let blocks = (sequence.tokens * group).div_ceil(row_block) as u64;
            total += blocks * heads as u64 * tiles(sequence) as u64;
        }
        total
    }

    /// Where worker `w` begins; for `w` = workers, where the last one ends.
    pub fn border(&self, w: usize) -> Border {
        let at = (u128::from(self.total) * w as u128 / self.workers as u128) as u64;
        // The last sequence that begins at or before `at`; sequences without work begin where the next one does.
        let sequence = self.sequences.partition_point(|s| s.begin <= at).saturating_sub(1);
        let end = Border { sequence: self.sequences.len(), rows: 0, heads: 0, tile: 0 };
        if at >= self.total {
            return end;
        }
        let tiles = tiles(&self.sequences[sequence]) as u64;
        let (row_cost, at) = (self.heads as u64 * tiles, at - self.sequences[sequence].begin);
        let (rows, at) = (at / row_cost, at % row_cost);
        let block_cost = self.head_block as u64 * tiles;
        let (heads, at) = (at / block_cost, at % block_cost);
        let tile = at / self.heads_of(heads as usize) as u64;
        Border { sequence, rows: rows as usize, heads: heads as usize, tile: tile as usize }
    }

    fn heads_of(&self, block: usize) -> usize {
        self.head_block.min(self.heads - block * self.head_block)
    }

    /// The split of the item at `at` from its tile up to `end`, and the item after it.
    fn split(&self, at: Border, end: &Border) -> (Split, Border) {
        let sequence = &self.sequences[at.sequence];
        let (rows, tiles) = (sequence.tokens * self.group, sequence.visible.tiles(TILE));
        let first_row = at.rows * self.row_block;
        let last = if at.same_item(end) { end.tile } else { tiles.len() };
        let split = Split {
            sequence: at.sequence,
            first_row,
            rows: self.row_block.min(rows.saturating_sub(first_row)),
            first_head: at.heads * self.head_block,
            heads: self.heads_of(at.heads),
            begin: tiles.start + at.tile,
            end: tiles.start + last,
            is_first: at.tile == 0,
            is_last: last == tiles.len(),
        };
        let next = if (at.heads + 1) * self.head_block < self.heads {
            Border { heads: at.heads + 1, tile: 0, ..at }
        } else if first_row + self.row_block < rows {
            Border { rows: at.rows + 1, heads: 0, tile: 0, ..at }
        } else {
            Border { sequence: at.sequence + 1, rows: 0, heads: 0, tile: 0 }
        };
        (split, next)
    }

    /// Calls `visit` with every split of worker `w` that has tiles, in order.
    pub fn splits(&self, w: usize, mut visit: impl FnMut(&Split)) {
        let (mut at, end) = (self.border(w), self.border(w + 1));
        while at != end && at.sequence < self.sequences.len() {
            let (split, next) = self.split(at, &end);
            if split.begin < split.end {
                visit(&split);
            }
            if at.same_item(&end) {
                break;
            }
            at = next;
        }
    }

    /// Calls `visit` with every item that several workers have a part of: its first split, the worker that has it, and
    /// the last worker that has a split of it (one between may have none).
    pub fn shared_items(&self, mut visit: impl FnMut(&Split, usize, usize)) {
        let mut w = 1;
        while w < self.workers {
            let border = self.border(w);
            if border.tile == 0 {
                w += 1;
                continue;
            }
            let mut last = w;
            while last + 1 < self.workers && self.border(last + 1).same_item(&border) {
                last += 1;
            }
            let (split, _) = self.split(Border { tile: 0, ..border }, &border);
            visit(&split, w - 1, last);
            w = last + 1;
        }
    }

    /// Whether worker `w` begins with tiles of an item that a worker before began.
    pub fn begins_inside(&self, w: usize) -> bool {
        let (begin, end) = (self.border(w), self.border(w + 1));
        begin.tile > 0 && !(begin.same_item(&end) && begin.tile == end.tile)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::attention::Visibility;

    #[test]
    fn every_tile_has_one_worker_and_every_shared_item_is_known() {
        for workers in [1, 2, 3, 7, 16] {
            for head_block in [1, 2, 3, 4] {
                let keys = [0usize, 1, 64, 65, 1000, 0, 3000, 5, 0];
                let mut sequences: Vec<Sequence> = keys
                    .iter()
                    .enumerate()
                    .map(|(i, &keys)| Sequence {
                        held: keys,
                        visible: Visibility { lo: keys / 3, hi: keys },
                        tokens: if i == 4 { 0 } else { 1 + i },
                        ..Sequence::default()
                    })
                    .collect();
                let total = Partition::measure(&mut sequences, 4, 3, 8);
                let partition =
                    Partition { sequences: &sequences, total, workers, heads: 4, head_block, group: 3, row_block: 8 };
                let mut seen = HashMap::new();
                let mut shared = HashMap::new();
                for w in 0..workers {
                    partition.splits(w, |p| {
                        for row in p.first_row..p.first_row + p.rows {
                            for head in p.first_head..p.first_head + p.heads {
                                for tile in p.begin..p.end {
                                    *seen.entry((p.sequence, row, head, tile)).or_insert(0) += 1;
                                }
                            }
                        }
                        if !p.is_whole() {
                            shared.entry((p.sequence, p.first_row, p.first_head)).or_insert(Vec::new()).push(w);
                        }
                    });
                }
                let tiles = |s: &Sequence| s.held.div_ceil(TILE) - (s.held / 3) / TILE;
                let wanted: usize = sequences.iter().map(|s| s.tokens * 3 * 4 * tiles(s)).sum();
                assert_eq!(seen.len(), wanted, "{workers} workers, blocks of {head_block}");
                assert!(seen.values().all(|&n| n == 1));
                partition.shared_items(|p, first, last| {
                    let mut found = vec![first];
                    found.extend((first + 1..=last).filter(|&w| partition.begins_inside(w)));
                    assert_eq!(shared.remove(&(p.sequence, p.first_row, p.first_head)), Some(found));
                });
                assert!(shared.is_empty(), "{shared:?}");
            }
        }
    }
}
