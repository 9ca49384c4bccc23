//! Unfinished partials: the sums of some rows and the power of two that they are over.
//!
//! [`OpenSums`] take in the keys of a leaf, in f32; [`ClosedSums`] take in leaves, and each other, in f64, and become
//! partials. So no f32 takes in more than a leaf's keys, and f64 loses less than 2^-28 of a sum at 2^31 keys.

use super::kernel::args::{CloseArgs, SUM_LANES};
use super::kernel::merge::power_of_two;
use super::kernel::table::Kernels;
use crate::partial::Lse;

/// How many rows sums have, and how long these are.
#[derive(Clone, Copy, Debug)]
pub struct SumSizes {
    /// Most rows.
    pub rows: usize,
    /// Elements of a value, padded to a multiple of 16.
    pub dim: usize,
}

impl SumSizes {
    /// Floats of a row: a weighted sum of values, then the weights summed lane by lane.
    pub fn width(self) -> usize {
        self.dim + SUM_LANES
    }

    /// Floats of one [`OpenSums`]; None where they do not fit.
    pub fn open_floats(self) -> Option<usize> {
        self.rows.checked_mul(self.width() + 1)?.checked_next_multiple_of(16)
    }

    /// Floats of one [`ClosedSums`]; None where they do not fit.
    pub fn closed_floats(self) -> Option<usize> {
        self.rows.checked_mul(2 * self.width() + 1)?.checked_next_multiple_of(16)
    }
}

/// Sums under way, over 2^max: short ones, closed before rounding errors can add up.
#[derive(Clone, Copy, Debug)]
pub struct OpenSums {
    /// f32 [rows, width].
    pub sums: *mut f32,
    /// `f32 [rows]`.
    pub max: *mut f32,
    width: usize,
}

impl OpenSums {
    /// The sums in `memory`.
    ///
    /// # Safety
    /// `memory` holds `sizes.open_floats()` floats that nobody else uses as long as these sums are used.
    pub unsafe fn at(memory: *mut f32, sizes: SumSizes) -> OpenSums {
        // SAFETY: within the floats of the sizes.
        let max = unsafe { memory.add(sizes.rows * sizes.width()) };
        OpenSums { sums: memory, max, width: sizes.width() }
    }

    /// The sums of row `r`.
    pub fn row(&self, r: usize) -> *mut f32 {
        self.sums.wrapping_add(r * self.width)
    }

    /// Empties the first `rows`.
    ///
    /// # Safety
    /// `rows` is at most that of the sizes.
    pub unsafe fn clear(&self, rows: usize) {
        // SAFETY: these rows are in the memory that `at` was given.
        unsafe {
            self.sums.write_bytes(0, rows * self.width);
            std::slice::from_raw_parts_mut(self.max, rows).fill(f32::NEG_INFINITY);
        }
    }
}

/// Sums in f64, over 2^max. The partial of a row is (values / weights, (max + log2 weights) ln 2).
#[derive(Clone, Copy, Debug)]
pub struct ClosedSums {
    /// `f64 [rows, width]`.
    sums: *mut f64,
    /// `f32 [rows]`.
    max: *mut f32,
    sizes: SumSizes,
}

impl ClosedSums {
    /// The sums in `memory`.
    ///
    /// # Safety
    /// `memory` is aligned to 8 bytes and holds `sizes.closed_floats()` floats that nobody else uses as long as these
    /// sums are used.
    pub unsafe fn at(memory: *mut f32, sizes: SumSizes) -> ClosedSums {
        // SAFETY: within the floats of these sizes: two for each f64.
        let max = unsafe { memory.add(2 * sizes.rows * sizes.width()) };
        ClosedSums { sums: memory.cast(), max, sizes }
    }

    /// Empties the first `rows`.
    ///
    /// # Safety
    /// `rows` is at most that of the sizes.
    pub unsafe fn clear(&self, rows: usize) {
        // SAFETY: these rows are in the memory that `at` was given.
        unsafe {
            self.sums.write_bytes(0, rows * self.sizes.width());
            std::slice::from_raw_parts_mut(self.max, rows).fill(f32::NEG_INFINITY);
        }
    }

    /// Takes in `rows` open rows and empties them; both begin at row `first`.
    ///
    /// # Safety
    /// Both have the same sizes and those rows; the kernels are this machine's.
    pub unsafe fn close(&self, kernels: &Kernels, open: &OpenSums, first: usize, rows: usize) {
        let width = self.sizes.width();
        // SAFETY: the rows are in the memory of both, which are apart; the kernels are this machine's.
        unsafe {
            (kernels.close)(&CloseArgs {
                closed: self.sums.add(first * width),
                closed_max: self.max.add(first),
                open: open.sums.add(first * width),
                // The maximum stays: the next sums begin over it.
                open_max: open.max.add(first).cast_const(),
                rows,
                width,
            });
        }
    }

    /// Takes in the first `rows` of another set.
    ///
    /// # Safety
    /// Both have the same sizes and those rows, in memory apart.
    pub unsafe fn merge(&self, from: &ClosedSums, rows: usize) {
        for r in 0..rows {
            // SAFETY: row `r` is in the memory of both, which are apart.
            let (sums, theirs) = unsafe { (self.row(r), from.row(r)) };
            // SAFETY: as above.
            let (max, their_max) = unsafe { (&mut *self.max.add(r), *from.max.add(r)) };
            let both = max.max(their_max);
            let (f, g) = (power_of_two(*max, both), power_of_two(their_max, both));
            for (sum, theirs) in sums.iter_mut().zip(theirs) {
                *sum = *sum * f + *theirs * g;
            }
            *max = both;
        }
    }

    /// # Safety
    /// `r` is one of the rows, which nobody else uses as long as the slice lives.
    unsafe fn row<'a>(&self, r: usize) -> &'a mut [f64] {
        let width = self.sizes.width();
        // SAFETY: the row is in the memory that `at` was given, aligned for f64.
        unsafe { std::slice::from_raw_parts_mut(self.sums.add(r * width), width) }
    }

    /// Row `r` as a partial: writes o and gives the lse. A row with a NaN weight is NaN throughout.
    ///
    /// # Safety
    /// `r` is one of the rows and `o` is no longer than its values.
    pub unsafe fn finish(&self, r: usize, o: &mut [f32]) -> Lse {
        // SAFETY: `r` is one of the rows, so that its sums and its maximum are in the memory of `at`; `self.max` has one a row.
        let (sums, max) = unsafe { (self.row(r), *self.max.add(r)) };
        let (values, weights) = sums.split_at(self.sizes.dim);
        let weights: f64 = weights.iter().sum();
        if weights == 0.0 {
            o.fill(0.0);
            return Lse::EMPTY;
        }
        if !weights.is_finite() {
            o.fill(f32::NAN);
            return Lse::NAN;
        }
        let each = 1.0 / weights;
        for (o, value) in o.iter_mut().zip(values) {
            *o = (value * each) as f32;
        }
        Lse::of(f64::from(max) * std::f64::consts::LN_2 + weights.ln())
    }
}
