//! What one worker does: its pieces of the line, tile by tile.

use super::kernels::Kernels;
use super::partition::{Line, Piece, leaf};
use super::rows::Rows;
use super::sequences::{Reader, Sequence, low_bits};
use super::state::{Open, StateShape, Total};
use super::tile::{Ahead, ScoreArgs, TILE, ValueArgs, WeighArgs, WidenArgs};

/// What every worker knows about the plan.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub q_heads: usize,
    /// Query heads of a kv head.
    pub group: usize,
    /// Most rows of a row block, at most [`TILE`].
    pub row_block: usize,
    /// Most kv heads of a head block.
    pub head_block: usize,
    /// Elements of q and k.
    pub dim_qk: usize,
    /// Elements of v.
    pub dim_v: usize,
    /// Bytes of an element of k and v.
    pub size: [usize; 2],
    /// Index of the element type of q, k and v among the kernels.
    pub element: [usize; 3],
    /// |scale| * log2 e as a sum of two floats.
    pub factor: [f32; 2],
    /// Whether the scale is below 0: q is negated then.
    pub negate: bool,
    /// Rows above which a tile is widened once instead of in every row group.
    pub widen_above: usize,
}

impl Shape {
    /// Elements of a row of q and k, padded.
    pub fn padded_qk(&self) -> usize {
        self.dim_qk.next_multiple_of(16)
    }

    /// Elements of a row of v, padded.
    pub fn padded_v(&self) -> usize {
        self.dim_v.next_multiple_of(16)
    }

    /// The states of an item.
    pub fn states(&self) -> StateShape {
        StateShape { rows: self.head_block * self.row_block, dim: self.padded_v() }
    }
}

/// Where things lie in a worker's scratch, in floats.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    q: usize,
    scores: usize,
    packed: usize,
    wide_k: usize,
    wide_v: usize,
    open: usize,
    /// Three totals: of the piece at work, and of the two pieces that may be split off.
    totals: [usize; 3],
    /// Floats of one worker.
    pub floats: usize,
}

impl Layout {
    /// The layout of a shape; None where the sizes overflow.
    pub fn of(shape: &Shape) -> Option<Layout> {
        let mut next = 0usize;
        let mut take = |n: Option<usize>| {
            let at = next;
            next = next.checked_add(n?.checked_next_multiple_of(16)?)?;
            Some(at)
        };
        let rows = shape.head_block.checked_mul(shape.row_block)?;
        let q = take(rows.checked_mul(shape.padded_qk()))?;
        let scores = take(shape.row_block.checked_mul(TILE))?;
        let packed = take(shape.row_block.checked_mul(TILE))?;
        let wide_k = take(TILE.checked_mul(shape.padded_qk()))?;
        let wide_v = take(TILE.checked_mul(shape.padded_v()))?;
        let open = take(shape.states().open_floats())?;
        let mut total = || take(shape.states().total_floats());
        let totals = [total()?, total()?, total()?];
        // Workers must not share a line, nor meet at the same cache sets.
        Some(Layout { q, scores, packed, wide_k, wide_v, open, totals, floats: next.checked_add(1024 + 16)? })
    }

    /// The piece of a split item that worker scratch `base` keeps: 0 the rest of an item begun before, 1 the beginning
    /// of one that goes on after.
    ///
    /// # Safety
    /// `base` points at `floats` floats of scratch.
    pub unsafe fn split(&self, base: *mut f32, shape: &Shape, which: usize) -> Total {
        // SAFETY: the total lies within the scratch.
        unsafe { Total::at(base.add(self.totals[1 + which]), shape.states()) }
    }
}

/// Where finished rows go: o [row, dim] and lse [row], row = query token * q heads + head.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Normalised outputs.
    pub o: *mut f32,
    /// Log-sum-exps.
    pub lse: *mut f32,
    /// Elements of a row.
    pub dim: usize,
}

// SAFETY: workers write disjoint rows.
unsafe impl Sync for Output {}

/// A worker at work on a step.
pub struct Worker<'a> {
    /// The plan.
    pub shape: &'a Shape,
    /// The kernels.
    pub kernels: &'a Kernels,
    /// The step.
    pub reader: Reader<'a>,
    /// All work.
    pub line: &'a Line<'a>,
    /// Where scratch lies.
    pub layout: &'a Layout,
    /// This worker's scratch.
    pub scratch: *mut f32,
    /// Where finished rows go.
    pub output: Output,
}

/// Which keys of a tile the query tokens of a row block see.
struct Sight {
    /// One mask a query token of the row block.
    masks: [u64; TILE],
    /// Query tokens.
    tokens: usize,
    /// Whether all see exactly the same first keys of the tile.
    uniform: bool,
    /// Whether any key is seen.
    any: bool,
}

/// Where weighted values go.
#[derive(Clone, Copy)]
struct Sums<'a> {
    open: &'a Open,
    total: &'a Total,
    /// First row of both.
    first: usize,
    /// Keys of a leaf.
    leaf: usize,
    /// Index of the values' element type among the kernels.
    element: usize,
}

impl Worker<'_> {
    /// Does worker `w`'s slice.
    ///
    /// # Safety
    /// The scratch is this worker's alone and as large as the layout says; the step's memory is what its fields say.
    pub unsafe fn run(&self, w: usize) {
        self.line.pieces(w, |piece| {
            // SAFETY: the caller's.
            unsafe { self.piece(piece) }
        });
    }

    unsafe fn piece(&self, piece: &Piece) {
        let shape = self.shape;
        let sequence = &self.line.sequences[piece.sequence];
        // SAFETY: the layout's places are disjoint parts of the scratch.
        unsafe {
            let total = if piece.whole {
                Total::at(self.scratch.add(self.layout.totals[0]), shape.states())
            } else {
                self.layout.split(self.scratch, shape, usize::from(piece.begin == 0))
            };
            let open = Open::at(self.scratch.add(self.layout.open), shape.states());
            total.clear(piece.rows * piece.heads);
            open.clear(piece.rows * piece.heads);
            for h in 0..piece.heads {
                self.load_q(piece, sequence, h);
            }
            let mut rows = [Rows::EMPTY; 2];
            self.fill(&mut rows[0], piece.sequence, sequence, piece.begin);
            for tile in piece.begin..piece.end {
                let now = (tile ^ piece.begin) & 1;
                let more = tile + 1 < piece.end;
                if more {
                    self.fill(&mut rows[1 - now], piece.sequence, sequence, tile + 1);
                }
                self.tile(piece, sequence, tile, &rows[now], more.then_some(&rows[1 - now]), &open, &total);
            }
            if piece.whole {
                self.write(piece, &total);
            }
        }
    }

    /// Writes the rows of a finished item.
    ///
    /// # Safety
    /// `total` is that of the item, complete.
    pub unsafe fn write(&self, piece: &Piece, total: &Total) {
        let (group, dim) = (self.shape.group, self.output.dim);
        let sequence = &self.line.sequences[piece.sequence];
        for h in 0..piece.heads {
            for r in 0..piece.rows {
                let (token, g) = ((piece.first_row + r) / group, (piece.first_row + r) % group);
                let row = (sequence.first_token + token) * self.shape.q_heads + (piece.first_head + h) * group + g;
                // SAFETY: the row is this item's; the output holds every row of the step.
                unsafe {
                    let o = std::slice::from_raw_parts_mut(self.output.o.add(row * dim), dim);
                    *self.output.lse.add(row) = total.finish(h * piece.rows + r, o);
                }
            }
        }
    }

    fn keys_of(&self, sequence: &Sequence, tile: usize) -> usize {
        TILE.min(sequence.keys - tile * TILE)
    }

    fn fill(&self, rows: &mut Rows, b: usize, sequence: &Sequence, tile: usize) {
        rows.fill(self.reader.desc, self.reader.step, b, sequence, tile * TILE, self.keys_of(sequence, tile));
    }

    /// Widens the queries of kv head `h` of the piece.
    unsafe fn load_q(&self, piece: &Piece, sequence: &Sequence, h: usize) {
        let (shape, step) = (self.shape, self.reader.step);
        let mut pointers = [std::ptr::null(); TILE];
        for (r, pointer) in pointers[..piece.rows].iter_mut().enumerate() {
            let (token, g) = ((piece.first_row + r) / shape.group, (piece.first_row + r) % shape.group);
            let head = (piece.first_head + h) * shape.group + g;
            let at = (sequence.first_token + token) as i64 * step.q_stride[0] + head as i64 * step.q_stride[1];
            *pointer = step.args.q.data.cast::<u8>().cast_const().wrapping_offset(at as isize);
        }
        // SAFETY: the rows are within the checked extent of q; the scratch holds rows x padded floats a head.
        unsafe {
            let out = self.q(piece, h);
            (self.kernels.widen[shape.element[0]])(&WidenArgs {
                rows: pointers.as_ptr(),
                offset: 0,
                keys: piece.rows,
                dim: shape.dim_qk,
                stride: step.q_stride[2],
                out,
            });
            if shape.negate {
                for x in std::slice::from_raw_parts_mut(out, piece.rows * shape.padded_qk()) {
                    *x = -*x;
                }
            }
        }
    }

    fn q(&self, piece: &Piece, h: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.q + h * piece.rows * self.shape.padded_qk())
    }

    fn sight(&self, piece: &Piece, sequence: &Sequence, tile: usize, keys: usize) -> Sight {
        let group = self.shape.group;
        let (first, last) = (piece.first_row / group, (piece.first_row + piece.rows - 1) / group);
        let mut sight = Sight { masks: [0; TILE], tokens: last - first + 1, uniform: true, any: false };
        let mut union = 0;
        for (i, mask) in sight.masks[..sight.tokens].iter_mut().enumerate() {
            *mask = self.reader.visible(piece.sequence, sequence, first + i, tile * TILE, keys);
            union |= *mask;
        }
        sight.any = union != 0;
        sight.uniform = union & union.wrapping_add(1) == 0 && sight.masks[..sight.tokens].iter().all(|&m| m == union);
        sight
    }

    /// One tile for every kv head of the piece.
    unsafe fn tile(
        &self,
        piece: &Piece,
        sequence: &Sequence,
        tile: usize,
        rows: &Rows,
        next: Option<&Rows>,
        open: &Open,
        total: &Total,
    ) {
        let (shape, step, layout) = (self.shape, self.reader.step, self.layout);
        let held = self.keys_of(sequence, tile);
        let sight = self.sight(piece, sequence, tile, held);
        if !sight.any {
            return;
        }
        let held_by_piece = (piece.end * TILE).min(sequence.keys) - piece.begin * TILE;
        let keys = if sight.uniform { sight.masks[0].count_ones() as usize } else { held };
        let (dim_k, dim_v) = (shape.padded_qk(), shape.padded_v());
        let width = shape.states().width();
        let plain = [step.k_stride[3] == shape.size[0] as i64, step.v_stride[3] == shape.size[1] as i64];
        let many = piece.rows > shape.widen_above;
        let widen_k = !plain[0] || dim_k != shape.dim_qk || (many && shape.element[1] != 0);
        let widen_v = !plain[1] || dim_v != shape.dim_v || (many && shape.element[2] != 0);
        let row_bytes = [shape.dim_qk * shape.size[0], shape.dim_v * shape.size[1]];
        // SAFETY: the layout's places are disjoint parts of the scratch, sized for these rows, keys and dimensions.
        unsafe {
            let scores = self.scratch.add(layout.scores);
            let wide = [self.scratch.add(layout.wide_k), self.scratch.add(layout.wide_v)];
            let wide_rows = |memory: *mut f32, dim: usize| -> [*const u8; TILE] {
                std::array::from_fn(|t| memory.wrapping_add(t * dim).cast::<u8>().cast_const())
            };
            let wide_k = if widen_k { wide_rows(wide[0], dim_k) } else { [std::ptr::null(); TILE] };
            let wide_v = if widen_v { wide_rows(wide[1], dim_v) } else { [std::ptr::null(); TILE] };
            for h in 0..piece.heads {
                let head = (piece.first_head + h) as i64;
                let offset = [(head * step.k_stride[2]) as usize, (head * step.v_stride[2]) as usize];
                let (ahead_rows, ahead_head) =
                    if h + 1 < piece.heads { (Some(rows), head + 1) } else { (next, piece.first_head as i64) };
                let ahead = |which: usize| match ahead_rows {
                    Some(rows) if plain[which] => Ahead {
                        rows: if which == 0 { rows.k.as_ptr() } else { rows.v.as_ptr() },
                        offset: (ahead_head * if which == 0 { step.k_stride[2] } else { step.v_stride[2] }) as usize,
                        bytes: row_bytes[which],
                    },
                    _ => Ahead::NOTHING,
                };
                let first = h * piece.rows;
                let mut score = ScoreArgs {
                    q: self.q(piece, h),
                    rows: piece.rows,
                    dim: dim_k,
                    k: rows.k.as_ptr(),
                    offset: offset[0],
                    keys,
                    scores,
                    ahead: ahead(0),
                };
                let mut k_element = shape.element[1];
                if widen_k {
                    self.widen(rows.k.as_ptr(), offset[0], keys, 0, wide[0]);
                    (score.k, score.offset, k_element) = (wide_k.as_ptr(), 0, 0);
                }
                (self.kernels.scores[k_element])(&score);
                self.hide(piece, &sight, keys, scores);
                (self.kernels.weigh)(&WeighArgs {
                    scores,
                    rows: piece.rows,
                    keys,
                    factor: shape.factor,
                    max: open.max.add(first),
                    open: open.sums.add(first * width),
                    dim: dim_v,
                });
                let mut value = ValueArgs {
                    weights: scores,
                    rows: piece.rows,
                    dim: dim_v,
                    v: rows.v.as_ptr(),
                    offset: offset[1],
                    keys,
                    open: open.sums.add(first * width),
                    ahead: ahead(1),
                };
                let mut v_element = shape.element[2];
                if widen_v {
                    self.widen(rows.v.as_ptr(), offset[1], keys, 1, wide[1]);
                    (value.v, value.offset, v_element) = (wide_v.as_ptr(), 0, 0);
                }
                let sums = Sums { open, total, first, leaf: leaf(held_by_piece), element: v_element };
                if sight.uniform {
                    self.values(&value, &sums);
                } else {
                    self.values_by_token(piece, &sight, &value, &sums);
                }
            }
        }
    }

    /// Adds weighted values up, leaf by leaf.
    unsafe fn values(&self, all: &ValueArgs, sums: &Sums<'_>) {
        for key in (0..all.keys).step_by(sums.leaf) {
            // SAFETY: the caller's arguments, key by key.
            unsafe {
                (self.kernels.values[sums.element])(&ValueArgs {
                    weights: all.weights.add(key),
                    v: all.v.add(key),
                    keys: sums.leaf.min(all.keys - key),
                    ahead: all.ahead.from(key),
                    ..*all
                });
                sums.total.close(self.kernels, sums.open, sums.first, all.rows);
            }
        }
    }

    unsafe fn widen(&self, rows: *const *const u8, offset: usize, keys: usize, which: usize, out: *mut f32) {
        let (shape, step) = (self.shape, self.reader.step);
        let (dim, stride) = if which == 0 { (shape.dim_qk, step.k_stride[3]) } else { (shape.dim_v, step.v_stride[3]) };
        // SAFETY: the caller's rows are a tile's, within the checked extents of k and v.
        unsafe { (self.kernels.widen[shape.element[1 + which]])(&WidenArgs { rows, offset, keys, dim, stride, out }) }
    }

    /// Sets the scores of hidden keys, and of the places past the last key, to -inf.
    unsafe fn hide(&self, piece: &Piece, sight: &Sight, keys: usize, scores: *mut f32) {
        let padded = keys.next_multiple_of(16);
        if sight.uniform && keys == padded {
            return;
        }
        let first = piece.first_row / self.shape.group;
        for r in 0..piece.rows {
            let mask = sight.masks[(piece.first_row + r) / self.shape.group - first] & low_bits(keys);
            // SAFETY: a row of scores holds TILE floats.
            let row = unsafe { std::slice::from_raw_parts_mut(scores.add(r * TILE), padded) };
            for (t, score) in row.iter_mut().enumerate() {
                if mask >> t & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// The values of a tile whose query tokens see different keys: each token takes the keys that it sees and reads no
    /// other, so that what is hidden from it cannot reach it, not even as 0 * NaN.
    unsafe fn values_by_token(&self, piece: &Piece, sight: &Sight, all: &ValueArgs, sums: &Sums<'_>) {
        let group = self.shape.group;
        let first = piece.first_row / group;
        let mut r = 0;
        while r < piece.rows {
            let token = (piece.first_row + r) / group;
            let rows = ((token + 1) * group - piece.first_row - r).min(piece.rows - r);
            let mask = sight.masks[token - first];
            let mut pointers = [std::ptr::null(); TILE];
            // SAFETY: `packed` has the size of the scores; only pointers and weights of the tile's keys are read.
            unsafe {
                let packed = self.scratch.add(self.layout.packed);
                let mut keys = 0;
                for t in (0..all.keys).filter(|t| mask >> t & 1 == 1) {
                    pointers[keys] = *all.v.add(t);
                    for i in 0..rows {
                        *packed.add(i * TILE + keys) = *all.weights.add((r + i) * TILE + t);
                    }
                    keys += 1;
                }
                let mine = ValueArgs {
                    weights: packed,
                    rows,
                    v: pointers.as_ptr(),
                    keys,
                    open: all.open.add(r * self.shape.states().width()),
                    ahead: Ahead::NOTHING,
                    ..*all
                };
                self.values(&mine, &Sums { first: sums.first + r, ..*sums });
            }
            r += rows;
        }
    }
}
