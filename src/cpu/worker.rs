//! What one worker does: its pieces of the line, tile by tile.

use super::kernels::Kernels;
use super::partition::{Line, Piece};
use super::rows::Rows;
use super::sequences::{Reader, Sequence};
use super::state::{StateShape, Total};
use super::task::Task;
use super::tile::{TILE, WidenArgs};
use crate::attention::Tensor;

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
    /// |scale|, where steps come with a zeta: scores are then scale q.k + zeta.v, and `factor` is log2 e alone.
    pub tilt: Option<f32>,
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
    /// Queries, widened.
    q: usize,
    /// Scores, then weights, of a tile.
    pub scores: usize,
    /// Weights of the keys that one query token sees.
    pub packed: usize,
    /// Where steps come with a zeta: its rows, and zeta.v of a tile.
    zeta: usize,
    pub tilts: usize,
    /// Keys and values of a tile, widened.
    pub wide: [usize; 2],
    /// Open sums.
    pub open: usize,
    /// What the scores of each row are taken against, and its maximum with those of a tile.
    pub start: usize,
    pub tops: usize,
    /// Three totals: of the piece at work, and of the two pieces that may be split off.
    pub totals: [usize; 3],
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
        let scores = take(rows.checked_mul(TILE))?;
        let packed = take(shape.row_block.checked_mul(TILE))?;
        let tilted = if shape.tilt.is_some() { rows } else { 0 };
        let zeta = take(tilted.checked_mul(shape.padded_v()))?;
        let tilts = take(tilted.checked_mul(TILE))?;
        let wide = [take(TILE.checked_mul(shape.padded_qk()))?, take(TILE.checked_mul(shape.padded_v()))?];
        let open = take(shape.states().open_floats())?;
        let (start, tops) = (take(Some(rows))?, take(Some(rows))?);
        let mut total = || take(shape.states().total_floats());
        let totals = [total()?, total()?, total()?];
        // Workers must not share a line, nor meet at the same cache sets.
        Some(Layout {
            q,
            scores,
            packed,
            zeta,
            tilts,
            wide,
            open,
            start,
            tops,
            totals,
            floats: next.checked_add(1024 + 16)?,
        })
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
        let sequence = &self.line.sequences[piece.sequence];
        // SAFETY: the layout's places are disjoint parts of the scratch.
        unsafe {
            for h in 0..piece.heads {
                self.load_q(piece, sequence, h);
            }
            let task = Task::new(self, piece);
            let mut rows = [Rows::EMPTY; 2];
            self.fill(&mut rows[0], piece.sequence, sequence, piece.begin);
            for tile in piece.begin..piece.end {
                let now = (tile ^ piece.begin) & 1;
                let more = tile + 1 < piece.end;
                if more {
                    self.fill(&mut rows[1 - now], piece.sequence, sequence, tile + 1);
                }
                task.tile(tile, &rows[now], more.then_some(&rows[1 - now]));
            }
            task.finish();
            if piece.whole {
                self.write(piece, &task.total);
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

    /// Keys of a tile.
    pub fn keys_of(&self, sequence: &Sequence, tile: usize) -> usize {
        TILE.min(sequence.keys - tile * TILE)
    }

    fn fill(&self, rows: &mut Rows, b: usize, sequence: &Sequence, tile: usize) {
        rows.fill(self.reader.desc, self.reader.step, b, sequence, tile * TILE, self.keys_of(sequence, tile));
    }

    /// Widens the queries of kv head `h` of the piece, and its zeta if the step has one.
    unsafe fn load_q(&self, piece: &Piece, sequence: &Sequence, h: usize) {
        let (shape, step) = (self.shape, self.reader.step);
        let q = self.q(piece, h);
        // SAFETY: the scratch holds rows x padded floats a head of each.
        unsafe {
            let (element, dim) = (shape.element[0], shape.dim_qk);
            self.load_rows(piece, sequence, h, &step.args.q, &step.q_stride, (element, dim), q);
            if shape.negate {
                for x in std::slice::from_raw_parts_mut(q, piece.rows * shape.padded_qk()) {
                    *x = -*x;
                }
            }
            if shape.tilt.is_some() {
                let zeta = self.zeta(piece, h);
                self.load_rows(piece, sequence, h, &step.zeta, &step.zeta_stride, (0, shape.dim_v), zeta);
            }
        }
    }

    /// Widens the piece's rows for kv head `h` of a tensor [token, query head, dim] with this element type and dim.
    #[allow(clippy::too_many_arguments)] // what is read, and where it goes
    unsafe fn load_rows(
        &self,
        piece: &Piece,
        sequence: &Sequence,
        h: usize,
        tensor: &Tensor,
        stride: &[i64; 4],
        (element, dim): (usize, usize),
        out: *mut f32,
    ) {
        let group = self.shape.group;
        let mut pointers = [std::ptr::null(); TILE];
        for (r, pointer) in pointers[..piece.rows].iter_mut().enumerate() {
            let (token, g) = ((piece.first_row + r) / group, (piece.first_row + r) % group);
            let head = (piece.first_head + h) * group + g;
            let at = (sequence.first_token + token) as i64 * stride[0] + head as i64 * stride[1];
            *pointer = tensor.data.cast::<u8>().cast_const().wrapping_offset(at as isize);
        }
        let rows = pointers.as_ptr();
        // SAFETY: the rows are within the tensor's checked extent; the caller vouches for `out`.
        unsafe {
            (self.kernels.widen[element])(&WidenArgs { rows, offset: 0, keys: piece.rows, dim, stride: stride[2], out })
        }
    }

    /// The widened zeta of kv head `h` of the piece, f32 [rows, padded dim].
    pub fn zeta(&self, piece: &Piece, h: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.zeta + h * piece.rows * self.shape.padded_v())
    }

    /// The widened queries of kv head `h` of the piece, f32 [rows, padded dim].
    pub fn q(&self, piece: &Piece, h: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.q + h * piece.rows * self.shape.padded_qk())
    }
}
