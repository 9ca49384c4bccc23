//! What is added to the scores of a split's rows: slopes, distances and masks, as the kernels take them.

use super::{TILE, Task};
use crate::attention::{Dtype, KvFormat, MaskElement};
use crate::cpu::kernel::args::WidenArgs;
use crate::cpu::kernel::table::codec_of;

impl Task<'_> {
    /// Slopes and factors of the split's rows, and where their distances and masks will be.
    ///
    /// # Safety
    /// As [`new`](Self::new), and the step's memory is what its fields say.
    pub(super) unsafe fn load_terms(&mut self) {
        let (worker, split) = (self.worker, self.split);
        let (shape, layout, step) = (worker.shape, worker.layout, worker.reader.step());
        let group = shape.group;
        let by_head = step.mask.is_some_and(|mask| mask.is_by_head());
        let at = |offset: usize, row: usize| worker.scratch.wrapping_add(offset + row * TILE).cast_const();
        for r in 0..split.rows {
            let (token, g) = ((split.first_row + r) / group, (split.first_row + r) % group);
            let token_row = token - split.first_row / group;
            self.distances[r] = at(layout.distances, token_row);
            self.masks[r] = at(layout.masks, if by_head { r } else { token_row });
            for h in 0..split.heads {
                let (head, row) = ((split.first_head + h) * group + g, h * split.rows + r);
                // SAFETY: the layout has a row's number for each row of a block of heads where the shape has such a term; the
                // heads are those of the step, for which `Step::new` found slopes and factors, readable as promised.
                unsafe {
                    if shape.mods.has_slopes() {
                        let slope = f64::from(step.slopes.get(head, 0.0));
                        *worker.scratch.add(layout.slopes + row) = (-slope * shape.bias_factor) as f32;
                    }
                    if shape.mods.has_mask() {
                        let factor = f64::from(step.mask_factor.get(head, 1.0));
                        *worker.scratch.add(layout.factors + row) = (factor * shape.bias_factor) as f32;
                    }
                }
            }
        }
    }

    /// The distances of the `keys` keys from slot `slot` on from each query token of the split.
    pub(super) fn load_distances(&self, slot: usize, keys: usize) {
        let (worker, split, group) = (self.worker, self.split, self.worker.shape.group);
        let mut positions = [0; TILE];
        worker.reader.key_positions(split.sequence, self.sequence, split.first_head).fill(slot, &mut positions[..keys]);
        let (first, last) = (split.first_row / group, (split.first_row + split.rows - 1) / group);
        for token in first..=last {
            // Positions are int32 from 0 on, and so are distances.
            let own = worker.reader.position(self.sequence, token) as i32;
            let to = worker.scratch.wrapping_add(worker.layout.distances + (token - first) * TILE);
            // SAFETY: `new` was promised scratch as large as the layout says, which has room for a tile's distances from each
            // row of a row block: `token - first` is below that. It is initialised memory of this worker alone, and no other
            // slice of it is live here.
            let to = unsafe { std::slice::from_raw_parts_mut(to, TILE) };
            to.iter_mut().zip(&positions).for_each(|(to, &key)| *to = own.wrapping_sub(key).wrapping_abs() as f32);
        }
    }

    /// What the mask adds to the `keys` keys from slot `slot` on, for each query token or, where heads have masks of their
    /// own, each row of the split.
    ///
    /// # Safety
    /// As [`tile`](Self::tile); the step has an additive mask.
    pub(super) unsafe fn load_masks(&self, slot: usize, keys: usize) {
        let (worker, split, group) = (self.worker, self.split, self.worker.shape.group);
        let Some(mask) = worker.reader.step().mask else { return };
        let dtype = if mask.element() == MaskElement::F16 { Dtype::F16 } else { Dtype::F32 };
        let widen = worker.kernels.widen[codec_of(KvFormat::of(dtype))];
        let mut r = 0;
        while r < split.rows {
            let (token, g) = ((split.first_row + r) / group, (split.first_row + r) % group);
            let head = split.first_head * group + g;
            let row = mask.address(split.sequence, head, token, slot);
            let (rows, out) = (&raw const row, self.masks[r].cast_mut());
            let args = WidenArgs { rows, offset: 0, count: 1, dim: keys, stride: mask.slot_stride(), out };
            // SAFETY: keys that the sequence holds, which the mask was checked to have room for; the layout has room for a
            // tile's values of each row.
            unsafe { widen(&args) };
            r += if mask.is_by_head() { 1 } else { group - g };
        }
    }
}
