//! Unfinished partials: the sums of some rows and the power of two that they are over.
//!
//! [`OpenSums`] take in the keys of a leaf; [`ClosedSums`] take in leaves, and each other, with the rounding error of every
//! addition kept, and become partials.

use super::kernel::args::{MergeArgs, SUM_LANES};
use super::kernel::table::Kernels;

/// The shape of a set of sums.
#[derive(Clone, Copy, Debug)]
pub struct SumShape {
    /// Most rows.
    pub rows: usize,
    /// Elements of a value, padded to a multiple of 16.
    pub dim: usize,
}

impl SumShape {
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

/// Sums under way, over 2^max: short ones, closed before rounding can pile up.
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
    /// `memory` holds `shape.open_floats()` floats that nobody else uses as long as these sums are used.
    pub unsafe fn at(memory: *mut f32, shape: SumShape) -> OpenSums {
        // SAFETY: within the floats of the shape.
        let max = unsafe { memory.add(shape.rows * shape.width()) };
        OpenSums { sums: memory, max, width: shape.width() }
    }

    /// The sums of row `r`.
    pub fn row(&self, r: usize) -> *mut f32 {
        self.sums.wrapping_add(r * self.width)
    }

    /// Empties the first `rows`.
    ///
    /// # Safety
    /// `rows` is at most the shape's.
    pub unsafe fn clear(&self, rows: usize) {
        // SAFETY: these rows are in the memory that `at` was given.
        unsafe {
            self.sums.write_bytes(0, rows * self.width);
            std::slice::from_raw_parts_mut(self.max, rows).fill(f32::NEG_INFINITY);
        }
    }
}

/// Sums in two parts, high and low, over 2^max: as good as exact, however many sums they took in. The partial of a row
/// is (values / weights, (max + log2 weights) ln 2). Weights are at most 1, so values above 3.4e38 / keys may overflow.
#[derive(Clone, Copy, Debug)]
pub struct ClosedSums {
    high: *mut f32,
    low: *mut f32,
    max: *mut f32,
    shape: SumShape,
}

impl ClosedSums {
    /// The sums in `memory`.
    ///
    /// # Safety
    /// `memory` holds `shape.closed_floats()` floats that nobody else uses as long as these sums are used.
    pub unsafe fn at(memory: *mut f32, shape: SumShape) -> ClosedSums {
        let part = shape.rows * shape.width();
        // SAFETY: within the floats of the shape.
        unsafe { ClosedSums { high: memory, low: memory.add(part), max: memory.add(2 * part), shape } }
    }

    /// Empties the first `rows`.
    ///
    /// # Safety
    /// `rows` is at most the shape's.
    pub unsafe fn clear(&self, rows: usize) {
        // SAFETY: these rows are in the memory that `at` was given.
        unsafe {
            self.high.write_bytes(0, rows * self.shape.width());
            self.low.write_bytes(0, rows * self.shape.width());
            std::slice::from_raw_parts_mut(self.max, rows).fill(f32::NEG_INFINITY);
        }
    }

    /// Takes in `rows` open rows and empties them; both begin at row `first`.
    ///
    /// # Safety
    /// Both have the same shape and those rows; the kernels are this machine's.
    pub unsafe fn close(&self, kernels: &Kernels, open: &OpenSums, first: usize, rows: usize) {
        let width = self.shape.width();
        // SAFETY: the rows are in the memory of both, which are apart; the kernels are this machine's.
        unsafe {
            let sums = open.sums.add(first * width);
            let args = MergeArgs {
                to: [self.high.add(first * width), self.low.add(first * width)],
                to_max: self.max.add(first),
                from: [sums, std::ptr::null_mut()],
                from_max: open.max.add(first).cast_const(),
                rows,
                width,
            };
            // The maximum stays: the next sums begin over it.
            (kernels.merge)(&args);
        }
    }

    /// Takes in the first `rows` of another set.
    ///
    /// # Safety
    /// As [`close`](Self::close).
    pub unsafe fn merge(&self, kernels: &Kernels, from: &ClosedSums, rows: usize) {
        let args = MergeArgs {
            to: [self.high, self.low],
            to_max: self.max,
            from: [from.high, from.low],
            from_max: from.max.cast_const(),
            rows,
            width: self.shape.width(),
        };
        // SAFETY: the rows are in the memory of both, which are apart; the kernels are this machine's.
        unsafe { (kernels.merge)(&args) }
    }

    /// Row `r` as a partial: writes o and gives the lse. A row with a NaN weight is NaN throughout.
    ///
    /// # Safety
    /// `r` is a row of the shape and `o` is no longer than its values.
    pub unsafe fn finish(&self, r: usize, o: &mut [f32]) -> f32 {
        let (dim, width) = (self.shape.dim, self.shape.width());
        // SAFETY: row `r` is in the memory that `at` was given.
        let (high, low, max) = unsafe {
            (
                std::slice::from_raw_parts(self.high.add(r * width), width),
                std::slice::from_raw_parts(self.low.add(r * width), width),
                *self.max.add(r),
            )
        };
        let weights: f64 = high[dim..].iter().zip(&low[dim..]).map(|(&h, &l)| f64::from(h) + f64::from(l)).sum();
        if weights == 0.0 {
            o.fill(0.0);
            return f32::NEG_INFINITY;
        }
        if !weights.is_finite() {
            o.fill(f32::NAN);
            return f32::NAN;
        }
        let each = 1.0 / weights;
        for ((o, &high), &low) in o.iter_mut().zip(high).zip(low) {
            // The low part of an infinite sum is NaN and means nothing.
            let low = if high.is_finite() { low } else { 0.0 };
            *o = ((f64::from(high) + f64::from(low)) * each) as f32;
        }
        (f64::from(max) * std::f64::consts::LN_2 + weights.ln()) as f32
    }
}
