//! The flat partition: all work of a step in one line, cut into equal slices, one a worker. Split borders and the order
//! in which split work meets are decided here and nowhere else.
//!
//! The line runs over sequences, then row blocks (query token x query head of the group), then blocks of kv heads, then
//! tiles of keys; one kv head of one tile counts 1. A cut falls on a tile border. An *item* is one row block of one block
//! of kv heads; a *piece* is the part of an item that one worker has. Inside a piece, leaves of [`leaf`] keys meet in
//! order; pieces of an item meet in the order of the workers. What has met is kept in two parts ([`Total`]
//! (super::state::Total)), so that the order costs no accuracy at any length.

use super::sequences::Sequence;
use super::tile::{TILE, run};

/// Keys of a leaf: how many add up before they are closed into the total of their piece, given the keys and rows of the
/// piece. Rounding averages out over leaves, so few keys are cut finer; and equal keys have equal errors, the more of
/// them the shorter the runs of keys that meet in registers.
pub fn leaf(keys: usize, rows: usize) -> usize {
    match keys {
        ..=64 => 4,
        65..=512 => 64,
        _ => 16 * run(rows),
    }
}

/// How a step's work is laid out in a line.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
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

/// A tile border on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sequence; their number at the line's end.
    pub sequence: usize,
    /// The row block.
    pub rows: usize,
    /// The block of kv heads.
    pub heads: usize,
    /// The tile that follows.
    pub tile: usize,
}

impl Place {
    fn same_item(&self, other: &Place) -> bool {
        (self.sequence, self.rows, self.heads) == (other.sequence, other.rows, other.heads)
    }
}

/// Part of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
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
    /// First tile.
    pub begin: usize,
    /// The tile after the last.
    pub end: usize,
    /// Whether this is all of the item.
    pub whole: bool,
}

fn tiles(sequence: &Sequence) -> usize {
    sequence.keys.div_ceil(TILE)
}

impl Line<'_> {
    /// Sets the begins of the sequences and gives the length of the line.
    pub fn lay(sequences: &mut [Sequence], heads: usize, group: usize, row_block: usize) -> u64 {
        let mut total = 0u64;
        for sequence in sequences {
            sequence.begin = total;
            let blocks = (sequence.tokens * group).div_ceil(row_block) as u64;
            total += blocks * heads as u64 * tiles(sequence) as u64;
        }
        total
    }

    /// Where worker `w` begins; for `w` = workers, where the last one ends.
    pub fn border(&self, w: usize) -> Place {
        let at = (u128::from(self.total) * w as u128 / self.workers as u128) as u64;
        // The last sequence that begins at or before `at`; sequences without work begin where the next one does.
        let sequence = self.sequences.partition_point(|s| s.begin <= at).saturating_sub(1);
        let end = Place { sequence: self.sequences.len(), rows: 0, heads: 0, tile: 0 };
        if at >= self.total {
            return end;
        }
        let tiles = tiles(&self.sequences[sequence]) as u64;
        let (row_cost, at) = (self.heads as u64 * tiles, at - self.sequences[sequence].begin);
        let (rows, at) = (at / row_cost, at % row_cost);
        let block_cost = self.head_block as u64 * tiles;
        let (heads, at) = (at / block_cost, at % block_cost);
        let tile = at / self.heads_of(heads as usize) as u64;
        Place { sequence, rows: rows as usize, heads: heads as usize, tile: tile as usize }
    }

    fn heads_of(&self, block: usize) -> usize {
        self.head_block.min(self.heads - block * self.head_block)
    }

    /// The piece of the item at `place` from its tile up to `end`, and the item after it.
    fn piece(&self, place: Place, end: &Place) -> (Piece, Place) {
        let sequence = &self.sequences[place.sequence];
        let (rows, tiles) = (sequence.tokens * self.group, tiles(sequence));
        let first_row = place.rows * self.row_block;
        let last = if place.same_item(end) { end.tile } else { tiles };
        let piece = Piece {
            sequence: place.sequence,
            first_row,
            rows: self.row_block.min(rows.saturating_sub(first_row)),
            first_head: place.heads * self.head_block,
            heads: self.heads_of(place.heads),
            begin: place.tile,
            end: last,
            whole: place.tile == 0 && last == tiles,
        };
        let next = if (place.heads + 1) * self.head_block < self.heads {
            Place { heads: place.heads + 1, tile: 0, ..place }
        } else if first_row + self.row_block < rows {
            Place { rows: place.rows + 1, heads: 0, tile: 0, ..place }
        } else {
            Place { sequence: place.sequence + 1, rows: 0, heads: 0, tile: 0 }
        };
        (piece, next)
    }

    /// Calls `visit` with every piece of worker `w` that has tiles, in order.
    pub fn pieces(&self, w: usize, mut visit: impl FnMut(&Piece)) {
        let (mut place, end) = (self.border(w), self.border(w + 1));
        while place != end && place.sequence < self.sequences.len() {
            let (piece, next) = self.piece(place, &end);
            if piece.begin < piece.end {
                visit(&piece);
            }
            if place.same_item(&end) {
                break;
            }
            place = next;
        }
    }

    /// Calls `visit` with every item that is split: its first piece, the worker that has it, and the last worker that
    /// has a piece of it (one between may have none).
    pub fn splits(&self, mut visit: impl FnMut(&Piece, usize, usize)) {
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
            let (piece, _) = self.piece(Place { tile: 0, ..border }, &border);
            visit(&piece, w - 1, last);
            w = last + 1;
        }
    }

    /// Whether worker `w`, which is not the item's first, has tiles of the item at its own begin.
    pub fn has_rest(&self, w: usize) -> bool {
        let (begin, end) = (self.border(w), self.border(w + 1));
        begin.tile > 0 && !(begin.same_item(&end) && begin.tile == end.tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_tile_has_one_worker_and_every_split_is_known() {
        for workers in [1, 2, 3, 7, 16] {
            for head_block in [1, 2, 3, 4] {
                let keys = [0usize, 1, 64, 65, 1000, 0, 3000, 5, 0];
                let mut sequences: Vec<Sequence> = keys
                    .iter()
                    .enumerate()
                    .map(|(i, &keys)| Sequence { keys, tokens: if i == 4 { 0 } else { 1 + i }, ..Sequence::default() })
                    .collect();
                let total = Line::lay(&mut sequences, 4, 3, 8);
                let line = Line { sequences: &sequences, total, workers, heads: 4, head_block, group: 3, row_block: 8 };
                let mut seen = HashMap::new();
                let mut partial = HashMap::new();
                for w in 0..workers {
                    line.pieces(w, |p| {
                        for row in p.first_row..p.first_row + p.rows {
                            for head in p.first_head..p.first_head + p.heads {
                                for tile in p.begin..p.end {
                                    *seen.entry((p.sequence, row, head, tile)).or_insert(0) += 1;
                                }
                            }
                        }
                        if !p.whole {
                            partial.entry((p.sequence, p.first_row, p.first_head)).or_insert(Vec::new()).push(w);
                        }
                    });
                }
                let wanted: usize = sequences.iter().map(|s| s.tokens * 3 * 4 * s.keys.div_ceil(TILE)).sum();
                assert_eq!(seen.len(), wanted, "{workers} workers, blocks of {head_block}");
                assert!(seen.values().all(|&n| n == 1));
                line.splits(|p, first, last| {
                    let mut found = vec![first];
                    found.extend((first + 1..=last).filter(|&w| line.has_rest(w)));
                    assert_eq!(partial.remove(&(p.sequence, p.first_row, p.first_head)), Some(found));
                });
                assert!(partial.is_empty(), "{partial:?}");
            }
        }
    }
}
