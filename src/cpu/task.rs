//! A piece at work: scores, weights and values of its tiles.

use super::ahead::{Ahead, Lines};
use super::partition::{Piece, leaf};
use super::rows::Rows;
use super::sequences::{Sequence, low_bits};
use super::state::{Open, Total};
use super::tile::{ScoreArgs, TILE, ValueArgs, WeighArgs, WidenArgs, keys_together};
use super::worker::Worker;

/// How far the maximum of a row may rise above what its scores are taken against before they are taken anew, in powers
/// of two. Scores against something near the largest are small where weights are not, and so are their rounding errors.
const NEAR: f32 = 8.0;

/// A piece with everything that stays the same over its tiles.
pub struct Task<'a> {
    /// What the piece has summed up.
    pub total: Total,
    open: Open,
    worker: &'a Worker<'a>,
    piece: &'a Piece,
    sequence: &'a Sequence,
    /// Keys of a leaf.
    leaf: usize,
    /// Keys and values, each: whether a tile is widened to f32 before it is used.
    widen: [bool; 2],
    /// Bytes of a row to ask for ahead of time.
    ahead: [usize; 2],
    /// How many keys ahead to ask: two blocks, which hides memory where it is fast and still fits the nearest cache.
    distance: usize,
    /// Strides between kv heads.
    head_stride: [i64; 2],
    /// Rows of the widened tiles.
    wide: [[*const u8; TILE]; 2],
}

/// kv heads of a piece.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    count: usize,
}

/// Which keys of a tile the query tokens of a row block see.
struct Sight {
    /// One mask a query token of the row block.
    masks: [u64; TILE],
    /// Whether all see exactly the same first keys of the tile.
    uniform: bool,
    /// Whether any key is seen.
    any: bool,
}

impl<'a> Task<'a> {
    /// Begins a piece: empty sums.
    ///
    /// # Safety
    /// The worker's scratch is its alone and has its layout.
    pub unsafe fn new(worker: &'a Worker<'a>, piece: &'a Piece) -> Task<'a> {
        let (shape, layout, step) = (worker.shape, worker.layout, worker.reader.step);
        let sequence = &worker.line.sequences[piece.sequence];
        // SAFETY: the layout's places are disjoint parts of the scratch.
        let (open, total) = unsafe {
            let total = if piece.whole {
                Total::at(worker.scratch.add(layout.totals[0]), shape.states())
            } else {
                layout.split(worker.scratch, shape, usize::from(piece.begin == 0))
            };
            let open = Open::at(worker.scratch.add(layout.open), shape.states());
            total.clear(piece.rows * piece.heads);
            open.clear(piece.rows * piece.heads);
            worker.scratch.add(layout.start).write_bytes(0, piece.rows * piece.heads);
            (open, total)
        };
        let dims = [(shape.dim_qk, shape.padded_qk()), (shape.dim_v, shape.padded_v())];
        let strides = [step.k_stride, step.v_stride];
        let mut task = Task {
            total,
            open,
            worker,
            piece,
            sequence,
            leaf: leaf((piece.end * TILE).min(sequence.keys) - piece.begin * TILE, piece.rows),
            widen: [false; 2],
            ahead: [0; 2],
            distance: 2 * keys_together(piece.rows),
            head_stride: [step.k_stride[2], step.v_stride[2]],
            wide: [[std::ptr::null(); TILE]; 2],
        };
        for i in 0..2 {
            let packed = strides[i][3] == shape.size[i] as i64;
            let many = piece.rows > shape.widen_above && shape.element[1 + i] != 0;
            task.widen[i] = !packed || dims[i].0 != dims[i].1 || many;
            task.ahead[i] = if packed { dims[i].0 * shape.size[i] } else { 0 };
            for (t, row) in task.wide[i].iter_mut().enumerate() {
                *row = worker.scratch.wrapping_add(layout.wide[i] + t * dims[i].1).cast::<u8>().cast_const();
            }
        }
        task
    }

    /// One tile for every kv head of the piece; `next` is the tile to come.
    ///
    /// # Safety
    /// The rows are those of the tile; the step's memory is what its fields say.
    pub unsafe fn tile(&self, tile: usize, rows: &Rows, next: Option<&Rows>) {
        let held = self.worker.keys_of(self.sequence, tile);
        let sight = self.sight(tile, held);
        if !sight.any {
            return;
        }
        let keys = if sight.uniform { sight.masks[0].count_ones() as usize } else { held };
        // A wide tile is made for one kv head at a time.
        let together = if self.widen[0] || self.widen[1] { 1 } else { self.piece.heads };
        for h in (0..self.piece.heads).step_by(together) {
            let heads = Heads { first: h, count: together };
            // SAFETY: the caller's.
            unsafe {
                self.weigh(heads, keys, &sight, rows);
                self.sum(heads, keys, &sight, rows, next);
                if ((tile + 1 - self.piece.begin) * TILE).is_multiple_of(self.leaf) {
                    let rows = self.piece.rows;
                    self.total.close(self.worker.kernels, &self.open, h * rows, together * rows);
                }
            }
        }
    }

    /// Ends the piece: `total` is complete.
    ///
    /// # Safety
    /// As [`tile`](Self::tile).
    pub unsafe fn finish(&self) {
        // SAFETY: the piece's own rows.
        unsafe { self.total.close(self.worker.kernels, &self.open, 0, self.piece.rows * self.piece.heads) }
    }

    fn sight(&self, tile: usize, keys: usize) -> Sight {
        let (piece, group) = (self.piece, self.worker.shape.group);
        let (first, last) = (piece.first_row / group, (piece.first_row + piece.rows - 1) / group);
        let mut sight = Sight { masks: [0; TILE], uniform: true, any: false };
        let masks = &mut sight.masks[..last - first + 1];
        let mut union = 0;
        for (i, mask) in masks.iter_mut().enumerate() {
            *mask = self.worker.reader.visible(piece.sequence, self.sequence, first + i, tile * TILE, keys);
            union |= *mask;
        }
        sight.uniform = union & union.wrapping_add(1) == 0 && masks.iter().all(|&m| m == union);
        sight.any = union != 0;
        sight
    }

    /// Bytes from kv head 0 to kv head `h` of the piece, in keys (0) or values (1).
    fn offset(&self, which: usize, h: usize) -> usize {
        ((self.piece.first_head + h) as i64 * self.head_stride[which]) as usize
    }

    /// The rows to ask for from key `from` on.
    fn lines(&self, which: usize, heads: Heads, rows: Option<&Rows>, from: usize) -> Lines {
        let Some(rows) = rows else { return Lines::NOTHING };
        let rows = if which == 0 { rows.k[from..].as_ptr() } else { rows.v[from..].as_ptr() };
        let (head, bytes) = (self.head_stride[which] as usize, self.ahead[which]);
        Lines { rows, offset: self.offset(which, heads.first), head, bytes }
    }

    /// What to ask for in the keys (0) or values (1) of a tile of `keys` keys: the rows `distance` keys on, those of
    /// the values after the keys, and of the next tile's keys after the values.
    fn ahead(&self, which: usize, heads: Heads, keys: usize, rows: &Rows, next: Option<&Rows>) -> Ahead {
        let split = keys.saturating_sub(self.distance) / self.distance * self.distance;
        let near = if split > 0 { self.lines(which, heads, Some(rows), self.distance) } else { Lines::NOTHING };
        let far = self.lines(1 - which, heads, if which == 0 { Some(rows) } else { next }, 0);
        Ahead { near, far, split }
    }

    /// The rows to work on, the bytes to add, and the index of their element type: as they lie, or widened.
    unsafe fn source(&self, which: usize, h: usize, keys: usize, rows: &Rows) -> (*const *const u8, usize, usize) {
        let (shape, step) = (self.worker.shape, self.worker.reader.step);
        let raw = if which == 0 { rows.k.as_ptr() } else { rows.v.as_ptr() };
        let (offset, element) = (self.offset(which, h), shape.element[1 + which]);
        if !self.widen[which] {
            return (raw, offset, element);
        }
        let (dim, stride) = if which == 0 { (shape.dim_qk, step.k_stride[3]) } else { (shape.dim_v, step.v_stride[3]) };
        let out = self.worker.scratch.wrapping_add(self.worker.layout.wide[which]);
        // SAFETY: the rows are a tile's, within the checked extents of k and v; the layout has room for a wide tile.
        unsafe { (self.worker.kernels.widen[element])(&WidenArgs { rows: raw, offset, keys, dim, stride, out }) };
        (self.wide[which].as_ptr(), 0, 0)
    }

    /// Scores, then weights, of a tile.
    unsafe fn weigh(&self, heads: Heads, keys: usize, sight: &Sight, rows: &Rows) {
        let (worker, piece) = (self.worker, self.piece);
        let first = heads.first * piece.rows;
        // SAFETY: the layout's places are disjoint parts of the scratch, sized for these rows, keys and dimensions.
        unsafe {
            let scores = worker.scratch.add(worker.layout.scores);
            let (k, offset, element) = self.source(0, heads.first, keys, rows);
            let start = worker.scratch.add(worker.layout.start + first);
            let mut score = ScoreArgs {
                q: worker.q(piece, heads.first),
                heads: heads.count,
                rows: piece.rows,
                dim: worker.shape.padded_qk(),
                k,
                offset,
                head: self.head_stride[0] as usize,
                keys,
                start,
                scores,
                ahead: self.ahead(0, heads, keys, rows, None),
            };
            let mut weigh = WeighArgs {
                scores,
                rows: heads.count * piece.rows,
                keys,
                factor: worker.shape.factor,
                start,
                near: if worker.shape.tilt.is_none() { NEAR } else { f32::INFINITY },
                tops: worker.scratch.add(worker.layout.tops),
                max: self.open.max.add(first),
                open: self.open.row(first),
                dim: worker.shape.padded_v(),
            };
            loop {
                (worker.kernels.scores[element])(&score);
                if let Some(scale) = worker.shape.tilt {
                    self.tilt(heads, keys, rows, scores, scale);
                }
                for h in 0..heads.count {
                    self.hide(sight, keys, scores.add(h * piece.rows * TILE));
                }
                if !(worker.kernels.weigh)(&weigh) {
                    return;
                }
                // Once more, against what was found.
                (score.ahead, weigh.near) = (Ahead::NOTHING, f32::INFINITY);
            }
        }
    }

    /// Turns q.k into scale q.k + zeta.v.
    unsafe fn tilt(&self, heads: Heads, keys: usize, rows: &Rows, scores: *mut f32, scale: f32) {
        let (worker, piece) = (self.worker, self.piece);
        // SAFETY: as in `weigh`; there is a zeta where the shape says so.
        unsafe {
            let tilts = worker.scratch.add(worker.layout.tilts);
            let (v, offset, element) = self.source(1, heads.first, keys, rows);
            (worker.kernels.scores[element])(&ScoreArgs {
                q: worker.zeta(piece, heads.first),
                heads: heads.count,
                rows: piece.rows,
                dim: worker.shape.padded_v(),
                k: v,
                offset,
                head: self.head_stride[1] as usize,
                keys,
                start: worker.scratch.add(worker.layout.start + heads.first * piece.rows),
                scores: tilts,
                ahead: Ahead::NOTHING,
            });
            for r in 0..heads.count * piece.rows {
                let scores = std::slice::from_raw_parts_mut(scores.add(r * TILE), keys.next_multiple_of(16));
                let tilts = std::slice::from_raw_parts(tilts.add(r * TILE), scores.len());
                for (score, &tilt) in scores.iter_mut().zip(tilts) {
                    // Rounded once.
                    *score = (f64::from(*score) * f64::from(scale) + f64::from(tilt)) as f32;
                }
            }
        }
    }

    /// Sets the scores of hidden keys, and of the places past the last key, to -inf.
    unsafe fn hide(&self, sight: &Sight, keys: usize, scores: *mut f32) {
        let padded = keys.next_multiple_of(16);
        if sight.uniform && keys == padded {
            return;
        }
        let (first_row, group) = (self.piece.first_row, self.worker.shape.group);
        for r in 0..self.piece.rows {
            let mask = sight.masks[(first_row + r) / group - first_row / group] & low_bits(keys);
            // SAFETY: a row of scores holds TILE floats.
            let row = unsafe { std::slice::from_raw_parts_mut(scores.add(r * TILE), padded) };
            for (t, score) in row.iter_mut().enumerate() {
                if mask >> t & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Weighted values of a tile.
    unsafe fn sum(&self, heads: Heads, keys: usize, sight: &Sight, rows: &Rows, next: Option<&Rows>) {
        let (worker, piece) = (self.worker, self.piece);
        let first = heads.first * piece.rows;
        // SAFETY: as in `weigh`.
        unsafe {
            let (v, offset, element) = self.source(1, heads.first, keys, rows);
            let all = ValueArgs {
                weights: worker.scratch.add(worker.layout.scores),
                heads: heads.count,
                rows: piece.rows,
                dim: worker.shape.padded_v(),
                v,
                offset,
                head: self.head_stride[1] as usize,
                keys,
                open: self.open.row(first),
                ahead: self.ahead(1, heads, keys, rows, next),
            };
            if sight.uniform {
                return self.sum_leaves(&all, element, first);
            }
            for h in 0..heads.count {
                let one = ValueArgs {
                    weights: all.weights.add(h * piece.rows * TILE),
                    heads: 1,
                    offset: offset + h * all.head,
                    ..all
                };
                self.sum_by_token(&one, element, first + h * piece.rows, sight);
            }
        }
    }

    /// Weighted values; where a leaf is shorter than a tile, leaf by leaf. The rows begin at `first`.
    unsafe fn sum_leaves(&self, all: &ValueArgs, element: usize, first: usize) {
        if self.leaf >= TILE {
            // SAFETY: the caller's arguments.
            return unsafe { (self.worker.kernels.values[element])(all) };
        }
        for key in (0..all.keys).step_by(self.leaf) {
            // SAFETY: the caller's arguments, key by key.
            unsafe {
                (self.worker.kernels.values[element])(&ValueArgs {
                    weights: all.weights.add(key),
                    v: all.v.add(key),
                    keys: self.leaf.min(all.keys - key),
                    ahead: Ahead::NOTHING,
                    ..*all
                });
                self.total.close(self.worker.kernels, &self.open, first, all.heads * all.rows);
            }
        }
    }

    /// The values of a tile whose query tokens see different keys: each token takes the keys that it sees and reads no
    /// other, so that what is hidden from it cannot reach it, not even as 0 * NaN.
    unsafe fn sum_by_token(&self, all: &ValueArgs, element: usize, first: usize, sight: &Sight) {
        let (piece, group) = (self.piece, self.worker.shape.group);
        let mut r = 0;
        while r < piece.rows {
            let token = (piece.first_row + r) / group;
            let rows = ((token + 1) * group - piece.first_row - r).min(piece.rows - r);
            let mask = sight.masks[token - piece.first_row / group];
            let mut v = [std::ptr::null(); TILE];
            // SAFETY: `packed` has the size of the scores; only pointers and weights of the tile's keys are read.
            unsafe {
                let packed = self.worker.scratch.add(self.worker.layout.packed);
                let mut keys = 0;
                for t in (0..all.keys).filter(|t| mask >> t & 1 == 1) {
                    v[keys] = *all.v.add(t);
                    for i in 0..rows {
                        *packed.add(i * TILE + keys) = *all.weights.add((r + i) * TILE + t);
                    }
                    keys += 1;
                }
                let open = self.open.row(first + r);
                let mine =
                    ValueArgs { weights: packed, rows, v: v.as_ptr(), keys, open, ahead: Ahead::NOTHING, ..*all };
                self.sum_leaves(&mine, element, first + r);
            }
            r += rows;
        }
    }
}
