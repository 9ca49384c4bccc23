//! A worker: what it works with, and how queries come in and finished rows go out.

use super::kernel::args::{TILE, WidenArgs};
use super::kernel::table::Kernels;
use super::partition::{Partition, Split};
use super::seen::Seen;
use super::sequences::{Reader, Sequence};
use super::shape::{Layout, RowFormat, Shape};
use super::sums::ClosedSums;
use crate::attention::Tensor;
use crate::partial::Lse;

/// Where finished rows go: `o [row, dim]` and `lse [row]`, row = query token * q heads + head.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// Normalised outputs.
    pub o: *mut f32,
    /// Log-sum-exps.
    pub lse: *mut Lse,
    /// Elements of a row.
    pub dim: usize,
}

// SAFETY: addresses and a number. Workers write through them, each the rows of its own whole items.
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
    pub partition: &'a Partition<'a>,
    /// Where scratch lies.
    pub layout: &'a Layout,
    /// This worker's scratch.
    pub scratch: *mut f32,
    /// Where finished rows go.
    pub output: Output,
}

impl Worker<'_> {
    /// Slots of a tile that are held, up to the last that some query token can see.
    pub fn keys_of(&self, sequence: &Sequence, tile: usize) -> usize {
        TILE.min(sequence.visible.hi - tile * TILE)
    }

    /// The first tile of the split from `tile` on of which some row sees a key; what its rows see goes to `seen`.
    pub fn next_seen(&self, split: &Split, tile: usize, seen: &mut Seen) -> Option<usize> {
        let sequence = &self.partition.sequences[split.sequence];
        (tile..split.end).find(|&tile| {
            let (slot, keys) = (tile * TILE, self.keys_of(sequence, tile));
            // SAFETY: the worker's reader filled the sequences of its partition, and `keys_of` ends the tile at the last key
            // that the sequence holds.
            unsafe { seen.look(&self.reader, split, sequence, self.shape.group, slot, keys) };
            seen.any
        })
    }

    /// The widened queries of kv head `h` of the split, f32 [rows, padded dim].
    pub fn q(&self, split: &Split, h: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.q + h * split.rows * self.shape.padded_qk())
    }

    /// The widened zeta of kv head `h` of the split, f32 [rows, padded dim].
    pub fn zeta(&self, split: &Split, h: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.zeta + h * split.rows * self.shape.padded_v())
    }

    /// Widens the queries of kv head `h` of the split, and its zeta if the step has one.
    ///
    /// # Safety
    /// The scratch is this worker's alone and as large as the layout says; the step's memory is what its fields say.
    pub unsafe fn load_q(&self, split: &Split, sequence: &Sequence, h: usize) {
        let (shape, step) = (self.shape, self.reader.step());
        let q = self.q(split, h);
        // SAFETY: the scratch is as this function was promised, and has room for the rows of every head of a block, padded; so is
        // the memory of q and zeta.
        unsafe {
            self.load_rows(split, sequence, h, (&step.args.q, &step.q_stride, &shape.q), q);
            if shape.q_factor != 1.0 {
                for x in std::slice::from_raw_parts_mut(q, split.rows * shape.padded_qk()) {
                    *x *= shape.q_factor;
                }
            }
            if shape.mods.is_biased() {
                self.load_rows(split, sequence, h, (&step.zeta, &step.zeta_stride, &shape.zeta), self.zeta(split, h));
            }
        }
    }

    /// Widens the split's rows for kv head `h` of a tensor [token, query head, dim] with these strides.
    ///
    /// # Safety
    /// The tensor is as large as the step's fields say; `out` has room for the rows, padded.
    unsafe fn load_rows(
        &self,
        split: &Split,
        sequence: &Sequence,
        h: usize,
        (tensor, stride, row): (&Tensor, &[i64; 4], &RowFormat),
        out: *mut f32,
    ) {
        let group = self.shape.group;
        let mut pointers = [std::ptr::null(); TILE];
        for (r, pointer) in pointers[..split.rows].iter_mut().enumerate() {
            let (token, g) = ((split.first_row + r) / group, (split.first_row + r) % group);
            let head = (split.first_head + h) * group + g;
            let at = (sequence.first_token + token) as i64 * stride[0] + head as i64 * stride[1];
            *pointer = tensor.data.cast::<u8>().cast_const().wrapping_offset(at as isize);
        }
        let (rows, count, dim) = (pointers.as_ptr(), split.rows, row.dim);
        // SAFETY: the rows are tokens and heads of the step, within the extent of the tensor that was checked when the step
        // was made.
        unsafe { (self.kernels.widen[row.codec])(&WidenArgs { rows, offset: 0, count, dim, stride: stride[2], out }) }
    }

    /// Writes the rows of a finished item.
    ///
    /// # Safety
    /// `sums` are those of the item, complete, and nobody else writes its rows.
    pub unsafe fn write(&self, item: &Split, sums: &ClosedSums) {
        let (group, dim) = (self.shape.group, self.output.dim);
        let sequence = &self.partition.sequences[item.sequence];
        for h in 0..item.heads {
            for r in 0..item.rows {
                let (token, g) = ((item.first_row + r) / group, (item.first_row + r) % group);
                let row = (sequence.first_token + token) * self.shape.q_heads + (item.first_head + h) * group + g;
                // SAFETY: the output holds every row of the step, and rows of an item are written by its worker alone, as this
                // function was promised.
                unsafe {
                    let o = std::slice::from_raw_parts_mut(self.output.o.add(row * dim), dim);
                    *self.output.lse.add(row) = sums.finish(h * item.rows + r, o);
                }
            }
        }
    }
}
