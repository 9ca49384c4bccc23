//! A split at work: scores, weights and values of its tiles.

mod terms;

use super::kernel::args::{
    MANY_KEYS, MOST_TOGETHER, ModifyArgs, ScaleArgs, ScoreArgs, TILE, ValueArgs, WeightArgs, WidenArgs,
};
use super::kernel::prefetch::{Prefetch, PrefetchRows};
use super::kernel::table::{DIRECT, WIDE};
use super::partition::{Split, leaf};
use super::rows::Rows;
use super::seen::Seen;
use super::sequences::Sequence;
use super::shape::SumsOf;
use super::sums::{ClosedSums, OpenSums};
use super::worker::Worker;
use crate::attention::visibility::low_bits;

/// How far the maximum of a row may rise above what its scores are measured from before they are computed anew, in powers
/// of two. Scores measured from near the largest are small where weights are not, and so are their rounding errors.
const ORIGIN_RANGE: f32 = 8.0;
/// Most rows of a row block for which k and v are widened in every row group instead of once. Widening once saves conversions,
/// but takes a tile for one kv head at a time, out of the order in which memory lies. That pays from about 20 rows on; with
/// fewer, 3 query tokens in one step took longer than 2 and 1 in two.
const WIDEN_ABOVE: usize = 16;
/// How many keys ahead to prefetch. The rows of so many keys, for all kv heads, fit the second cache, to which the lines go,
/// and cover the latency of memory. A multiple of the keys that any kernel walks together.
const AHEAD: usize = 32;
const _: () = assert!(AHEAD < TILE && AHEAD.is_multiple_of(MOST_TOGETHER) && AHEAD.is_multiple_of(MANY_KEYS));
/// Keys and values, as indices.
const K: usize = 0;
const V: usize = 1;

/// A split with everything that stays the same over its tiles.
pub struct Task<'a> {
    /// What the split has summed up.
    pub sums: ClosedSums,
    open: OpenSums,
    worker: &'a Worker<'a>,
    split: &'a Split,
    sequence: &'a Sequence,
    /// Keys of a leaf, and tiles since one was closed.
    leaf: usize,
    tiles: usize,
    /// Keys and values, each: whether a tile is widened to f32 before it is used.
    widen: [bool; 2],
    /// Bytes of a row to ask for ahead of time.
    row_bytes: [usize; 2],
    /// Strides between kv heads.
    head_stride: [i64; 2],
    /// Where the distances and the masks of each row are in the scratch.
    distances: [*const f32; TILE],
    masks: [*const f32; TILE],
    /// Rows of the widened tiles.
    wide: [[*const u8; TILE]; 2],
}

/// kv heads of a split.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    count: usize,
}

impl<'a> Task<'a> {
    /// Begins a split: empty sums.
    ///
    /// # Safety
    /// The worker's scratch is its alone and as large as the layout says, as long as the task lives; the step's memory is what its
    /// fields say.
    pub unsafe fn new(worker: &'a Worker<'a>, split: &'a Split) -> Task<'a> {
        let (shape, layout, step) = (worker.shape, worker.layout, worker.reader.step());
        let sequence = &worker.partition.sequences[split.sequence];
        let which = match (split.is_whole(), split.is_first) {
            (true, _) => SumsOf::Whole,
            (false, true) => SumsOf::Beginning,
            (false, false) => SumsOf::End,
        };
        let count = split.rows * split.heads;
        // SAFETY: the layout's parts are disjoint and within the scratch, and have room for the rows of a block of heads.
        let (open, sums) = unsafe {
            let sums = layout.sums(worker.scratch, shape, which);
            let open = OpenSums::at(worker.scratch.add(layout.open), shape.sums());
            sums.clear(count);
            open.clear(count);
            worker.scratch.add(layout.origin).write_bytes(0, count);
            (open, sums)
        };
        let strides = [step.k_stride, step.v_stride];
        let mut task = Task {
            sums,
            open,
            worker,
            split,
            sequence,
            leaf: leaf((split.end * TILE).min(sequence.visible.hi) - split.begin * TILE, split.rows),
            tiles: 0,
            widen: [false; 2],
            row_bytes: [0; 2],
            head_stride: [step.k_stride[2], step.v_stride[2]],
            distances: [std::ptr::null(); TILE],
            masks: [std::ptr::null(); TILE],
            wide: [[std::ptr::null(); TILE]; 2],
        };
        // SAFETY: this function was promised the scratch and the step's memory.
        unsafe { task.load_terms() };
        for i in [K, V] {
            let row = &shape.kv[i];
            let packed = row.format.is_packed(strides[i][3]);
            let many = split.rows > WIDEN_ABOVE && row.codec != WIDE;
            task.widen[i] = !packed || row.dim != row.padded() || many || row.codec >= DIRECT;
            task.row_bytes[i] = if packed { row.format.row_bytes(row.dim) } else { 0 };
            for (t, wide) in task.wide[i].iter_mut().enumerate() {
                *wide = worker.scratch.wrapping_add(layout.wide[i] + t * row.padded()).cast::<u8>().cast_const();
            }
        }
        task
    }

    /// One tile, of which some row sees a key, for every kv head of the split; `next` is the tile to come.
    ///
    /// # Safety
    /// The rows and `seen` are those of the tile; the step's memory is what its fields say.
    pub unsafe fn tile(&mut self, tile: usize, seen: &Seen, rows: &Rows, next: Option<&Rows>) {
        let keys = seen.prefix.unwrap_or_else(|| self.worker.keys_of(self.sequence, tile));
        if self.worker.shape.mods.has_slopes() {
            self.load_distances(tile * TILE, keys);
        }
        if seen.adds {
            // SAFETY: `keys_of`, as the prefix of `seen`, ends the tile at the last key that the sequence holds. A tile that
            // adds comes of an additive mask, which is readable, as this function was promised.
            unsafe { self.load_masks(tile * TILE, keys) };
        }
        self.tiles += 1;
        let closes = self.tiles * TILE >= self.leaf;
        if closes {
            self.tiles = 0;
        }
        // A wide tile is made for one kv head at a time.
        let together = if self.widen[K] || self.widen[V] { 1 } else { self.split.heads };
        for h in (0..self.split.heads).step_by(together) {
            let heads = Heads { first: h, count: together };
            // SAFETY: the heads are the split's; rows, `seen` and the step's memory are as this function was promised, and so
            // is the scratch (`new`), where the sums have a row for each of the split.
            unsafe {
                self.weigh(heads, keys, seen, rows);
                self.sum(heads, keys, seen, rows, next);
                if closes {
                    let rows = self.split.rows;
                    self.sums.close(self.worker.kernels, &self.open, h * rows, together * rows);
                }
            }
        }
    }

    /// Ends the split: `sums` are complete.
    ///
    /// # Safety
    /// As [`tile`](Self::tile).
    pub unsafe fn finish(&self) {
        // SAFETY: `new` laid both sums into the scratch that it was promised, apart, with a row for each of the split.
        unsafe { self.sums.close(self.worker.kernels, &self.open, 0, self.split.rows * self.split.heads) }
    }

    /// Bytes from kv head 0 to kv head `h` of the split, in keys or values.
    fn offset(&self, which: usize, h: usize) -> usize {
        ((self.split.first_head + h) as i64 * self.head_stride[which]) as usize
    }

    /// The rows to ask for from key `from` on.
    fn prefetch_rows(&self, which: usize, heads: Heads, rows: Option<&Rows>, from: usize) -> PrefetchRows {
        let Some(rows) = rows else { return PrefetchRows::NONE };
        let rows = if which == K { rows.k[from..].as_ptr() } else { rows.v[from..].as_ptr() };
        let (head, bytes) = (self.head_stride[which] as usize, self.row_bytes[which]);
        PrefetchRows { rows, offset: self.offset(which, heads.first), head, bytes }
    }

    /// What to ask for in the keys or values of a tile of `keys` keys: the rows [`AHEAD`] keys on, those of the values
    /// after the keys, and of the next tile's keys after the values. Where a tile is taken for one kv head at a time: the rows
    /// that are widened next.
    fn prefetch(&self, which: usize, heads: Heads, keys: usize, rows: &Rows, next: Option<&Rows>) -> Prefetch {
        if heads.count < self.split.heads {
            let following = Heads { first: heads.first + 1, ..heads };
            let next = match which {
                K => self.prefetch_rows(V, heads, Some(rows), 0),
                _ if following.first < self.split.heads => self.prefetch_rows(K, following, Some(rows), 0),
                _ => self.prefetch_rows(K, Heads { first: 0, ..heads }, next, 0),
            };
            return Prefetch { same: PrefetchRows::NONE, next, split: 0 };
        }
        let split = keys.saturating_sub(AHEAD) / AHEAD * AHEAD;
        let same = if split > 0 { self.prefetch_rows(which, heads, Some(rows), AHEAD) } else { PrefetchRows::NONE };
        let next = self.prefetch_rows(1 - which, heads, if which == K { Some(rows) } else { next }, 0);
        Prefetch { same, next, split }
    }

    /// The rows to work on, the bytes to add, and the codec: as they lie, or widened.
    ///
    /// # Safety
    /// As [`tile`](Self::tile); `keys` is at most the tile's.
    unsafe fn source(&self, which: usize, h: usize, keys: usize, rows: &Rows) -> (*const *const u8, usize, usize) {
        let (row, step) = (&self.worker.shape.kv[which], self.worker.reader.step());
        let raw = if which == K { rows.k.as_ptr() } else { rows.v.as_ptr() };
        let offset = self.offset(which, h);
        if !self.widen[which] {
            return (raw, offset, row.codec);
        }
        let (dim, stride) = (row.dim, if which == K { step.k_stride[3] } else { step.v_stride[3] });
        let out = self.worker.scratch.wrapping_add(self.worker.layout.wide[which]);
        let args = WidenArgs { rows: raw, offset, count: keys, dim, stride, out };
        // SAFETY: the rows are a tile's, within the checked extents of k and v; the layout has room for a wide tile.
        unsafe { (self.worker.kernels.widen[row.codec])(&args) };
        (self.wide[which].as_ptr(), 0, WIDE)
    }

    /// Scores, then weights, of a tile.
    ///
    /// # Safety
    /// As [`tile`](Self::tile); the heads are the split's.
    unsafe fn weigh(&self, heads: Heads, keys: usize, seen: &Seen, rows: &Rows) {
        let (worker, split) = (self.worker, self.split);
        let first = heads.first * split.rows;
        // SAFETY: the layout's parts are disjoint and have room for these rows, keys and dimensions.
        unsafe {
            let scores = worker.scratch.add(worker.layout.scores);
            let (k, offset, codec) = self.source(K, heads.first, keys, rows);
            let origin = worker.scratch.add(worker.layout.origin + first);
            let mut score = ScoreArgs {
                q: worker.q(split, heads.first),
                heads: heads.count,
                rows: split.rows,
                dim: worker.shape.padded_qk(),
                k,
                offset,
                head: self.head_stride[K] as usize,
                keys,
                origin,
                scores,
                prefetch: self.prefetch(K, heads, keys, rows, None),
            };
            let mods = worker.shape.mods;
            let modifies = mods.softcap() > 0.0 || mods.is_biased() || mods.has_slopes() || seen.adds;
            let [k_scaled, _] = worker.reader.step().scaled();
            let mut weight = WeightArgs {
                scores,
                rows: heads.count * split.rows,
                keys,
                factor: worker.shape.factor,
                origin,
                // Scaled products cannot begin with the origin of the scores. A cap needs the products themselves, and what is
                // added to scores may move maxima in every tile, which would need a second pass.
                origin_range: if modifies || k_scaled { f32::INFINITY } else { ORIGIN_RANGE },
                tile_max: worker.scratch.add(worker.layout.tile_max),
                max: self.open.max.add(first),
                open: self.open.row(first),
                dim: worker.shape.padded_v(),
            };
            loop {
                (worker.kernels.direct[codec].scores)(&score);
                self.scale(K, heads, keys, rows, scores);
                if modifies {
                    self.modify(heads, keys, seen, rows, scores);
                }
                for h in 0..heads.count {
                    self.hide(seen, keys, scores.add(h * split.rows * TILE));
                }
                if !(worker.kernels.weights)(&weight) {
                    return;
                }
                // Once more, from the origins that were found.
                (score.prefetch, weight.origin_range) = (Prefetch::NONE, f32::INFINITY);
            }
        }
    }

    /// Turns products into scores.
    ///
    /// # Safety
    /// As [`weigh`](Self::weigh).
    unsafe fn modify(&self, heads: Heads, keys: usize, seen: &Seen, rows: &Rows, scores: *mut f32) {
        let (worker, split) = (self.worker, self.split);
        let (shape, layout) = (worker.shape, worker.layout);
        // SAFETY: as in `weigh`; the layout has room for what the shape has of terms, which `load_terms` and `tile` filled.
        unsafe {
            let biases = worker.scratch.add(layout.biases);
            if shape.mods.is_biased() {
                let (v, offset, codec) = self.source(V, heads.first, keys, rows);
                (worker.kernels.direct[codec].scores)(&ScoreArgs {
                    q: worker.zeta(split, heads.first),
                    heads: heads.count,
                    rows: split.rows,
                    dim: shape.padded_v(),
                    k: v,
                    offset,
                    head: self.head_stride[V] as usize,
                    keys,
                    origin: worker.scratch.add(layout.origin + heads.first * split.rows),
                    scores: biases,
                    prefetch: Prefetch::NONE,
                });
                self.scale(V, heads, keys, rows, biases);
            }
            for h in 0..heads.count {
                let row = h * split.rows;
                let mut args = ModifyArgs::of(scores.add(row * TILE), split.rows, keys);
                (args.cap, args.cap_factor) = (shape.mods.softcap(), shape.cap_factor);
                if shape.mods.has_slopes() {
                    args.slopes = worker.scratch.add(layout.slopes + heads.first * split.rows + row);
                    args.distances = self.distances.as_ptr();
                }
                if seen.adds {
                    args.factors = worker.scratch.add(layout.factors + heads.first * split.rows + row);
                    args.masks = self.masks.as_ptr();
                }
                if shape.mods.is_biased() {
                    args.biases = biases.add(row * TILE);
                    args.bias_factor = shape.bias_factor as f32;
                }
                (worker.kernels.modify)(&args);
            }
        }
    }

    /// Multiplies scores of keys, or weights of values, by their scales, if the step has them.
    ///
    /// # Safety
    /// As [`weigh`](Self::weigh); `values` holds TILE floats for each row of the heads.
    unsafe fn scale(&self, which: usize, heads: Heads, keys: usize, rows: &Rows, values: *mut f32) {
        let (worker, step) = (self.worker, self.worker.reader.step());
        if !step.scaled()[which] {
            return;
        }
        let stride = [step.k_scale_stride, step.v_scale_stride][which][2];
        for h in 0..heads.count {
            let args = ScaleArgs {
                values: values.wrapping_add(h * self.split.rows * TILE),
                rows: self.split.rows,
                keys,
                scales: rows.scales[which].as_ptr(),
                offset: ((self.split.first_head + heads.first + h) as i64 * stride) as usize,
            };
            // SAFETY: the rows are a tile's, of which `keys` are held, within the extent that `Step::new` and the reader
            // checked for the scales.
            unsafe { (worker.kernels.scale)(&args) };
        }
    }

    /// Sets the scores of hidden keys, and of the elements past the last key, to -inf.
    ///
    /// # Safety
    /// `scores` holds TILE floats for each row of the split.
    unsafe fn hide(&self, seen: &Seen, keys: usize, scores: *mut f32) {
        let padded = keys.next_multiple_of(16);
        if seen.prefix.is_some() && keys == padded {
            return;
        }
        for r in 0..self.split.rows {
            let mask = seen.mask(r) & low_bits(keys);
            // SAFETY: the scores have a row of TILE floats for each of the split's, and `padded` is at most TILE; they were written
            // by this worker, which has no other slice of them here.
            let row = unsafe { std::slice::from_raw_parts_mut(scores.add(r * TILE), padded) };
            for (t, score) in row.iter_mut().enumerate() {
                if mask >> t & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Weighted values of a tile.
    ///
    /// # Safety
    /// As [`weigh`](Self::weigh), which was done for the same heads.
    unsafe fn sum(&self, heads: Heads, keys: usize, seen: &Seen, rows: &Rows, next: Option<&Rows>) {
        let (worker, split) = (self.worker, self.split);
        let first = heads.first * split.rows;
        // SAFETY: as in `weigh`.
        unsafe {
            let (v, offset, codec) = self.source(V, heads.first, keys, rows);
            let all = ValueArgs {
                weights: worker.scratch.add(worker.layout.scores),
                heads: heads.count,
                rows: split.rows,
                dim: worker.shape.padded_v(),
                v,
                offset,
                head: self.head_stride[V] as usize,
                keys,
                open: self.open.row(first),
                prefetch: self.prefetch(V, heads, keys, rows, next),
            };
            // The weights are summed already; the elements of hidden keys are not read from here on.
            self.scale(V, heads, keys, rows, worker.scratch.add(worker.layout.scores));
            if seen.prefix.is_some() {
                return self.sum_leaves(&all, codec, first);
            }
            for h in 0..heads.count {
                let one = ValueArgs {
                    weights: all.weights.add(h * split.rows * TILE),
                    heads: 1,
                    offset: offset + h * all.head,
                    ..all
                };
                self.sum_by_mask(&one, codec, first + h * split.rows, seen);
            }
        }
    }

    /// Weighted values; where a leaf is shorter than a tile, leaf by leaf. The rows begin at `first`.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    unsafe fn sum_leaves(&self, all: &ValueArgs, codec: usize, first: usize) {
        let values = self.worker.kernels.direct[codec].values;
        if self.leaf >= TILE {
            // SAFETY: the arguments describe valid memory, as this function was promised; the kernels are this machine's.
            return unsafe { values(all) };
        }
        for key in (0..all.keys).step_by(self.leaf) {
            // SAFETY: the arguments as above, of some of their keys; both sums have a row for each of the split.
            unsafe {
                values(&ValueArgs {
                    weights: all.weights.add(key),
                    v: all.v.add(key),
                    keys: self.leaf.min(all.keys - key),
                    prefetch: Prefetch::NONE,
                    ..*all
                });
                self.sums.close(self.worker.kernels, &self.open, first, all.heads * all.rows);
            }
        }
    }

    /// The values of a tile whose rows see different keys: rows that see the same take these keys and read no other, so that
    /// what is hidden from them cannot reach them, not even as 0 * NaN.
    ///
    /// # Safety
    /// As [`sum_leaves`](Self::sum_leaves); the arguments are those of one kv head, whose rows begin at `first`.
    unsafe fn sum_by_mask(&self, all: &ValueArgs, codec: usize, first: usize, seen: &Seen) {
        let split = self.split;
        let mut r = 0;
        while r < split.rows {
            let mask = seen.mask(r);
            let rows = (r..split.rows).take_while(|&row| seen.mask(row) == mask).count();
            let mut v = [std::ptr::null(); TILE];
            // SAFETY: `packed` has room for a row block; only pointers and weights of the tile's keys are read.
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
                let (v, open) = (v.as_ptr(), self.open.row(first + r));
                let mine = ValueArgs { weights: packed, rows, v, keys, open, prefetch: Prefetch::NONE, ..*all };
                self.sum_leaves(&mine, codec, first + r);
            }
            r += rows;
        }
    }
}
