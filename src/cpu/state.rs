//! Unfinished partials: accumulators, sums of weights and maxima of some rows, and the binary counter they meet in.

use super::kernels::Kernels;
use super::partition::LEVELS;
use super::tile::{FoldArgs, SUM_LANES};

/// The shape of a set of states.
#[derive(Clone, Copy, Debug)]
pub struct StateShape {
    /// Most rows.
    pub rows: usize,
    /// Elements of an accumulator row, a multiple of 16.
    pub dim: usize,
}

impl StateShape {
    /// Floats of one set; None where they do not fit.
    pub fn floats(self) -> Option<usize> {
        let row = self.dim + SUM_LANES + 1;
        self.rows.checked_mul(row)?.checked_next_multiple_of(16)
    }
}

/// A set of states: for each row r an accumulator acc[r], weights summed lane by lane, and the power of two that they
/// are all over. The partial is (acc / sum, (max + log2 sum) ln 2).
#[derive(Clone, Copy, Debug)]
pub struct States {
    /// f32 [rows, dim].
    pub acc: *mut f32,
    /// f32 [rows, SUM_LANES].
    pub sum: *mut f32,
    /// f32 [rows].
    pub max: *mut f32,
    dim: usize,
}

impl States {
    /// The states in `memory`.
    ///
    /// # Safety
    /// `memory` holds `shape.floats()` floats that nobody else uses while these states are.
    pub unsafe fn at(memory: *mut f32, shape: StateShape) -> States {
        // SAFETY: within the floats of the shape.
        let (sum, max) =
            unsafe { (memory.add(shape.rows * shape.dim), memory.add(shape.rows * (shape.dim + SUM_LANES))) };
        States { acc: memory, sum, max, dim: shape.dim }
    }

    /// Makes the first `rows` states empty; keeps the maxima if asked.
    ///
    /// # Safety
    /// `rows` is at most the shape's.
    pub unsafe fn clear(&self, rows: usize, keep_max: bool) {
        // SAFETY: the shape's memory.
        unsafe {
            self.acc.write_bytes(0, rows * self.dim);
            self.sum.write_bytes(0, rows * SUM_LANES);
            if !keep_max {
                std::slice::from_raw_parts_mut(self.max, rows).fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Copies the first `rows` states.
    ///
    /// # Safety
    /// Both sets have that many rows and do not overlap.
    pub unsafe fn copy_from(&self, from: &States, rows: usize) {
        // SAFETY: the caller's.
        unsafe {
            self.acc.copy_from_nonoverlapping(from.acc, rows * self.dim);
            self.sum.copy_from_nonoverlapping(from.sum, rows * SUM_LANES);
            self.max.copy_from_nonoverlapping(from.max, rows);
        }
    }

    /// Takes in the first `rows` states of another set.
    ///
    /// # Safety
    /// As [`copy_from`](Self::copy_from).
    pub unsafe fn fold(&self, kernels: &Kernels, from: &States, rows: usize) {
        let args = FoldArgs {
            to: [self.acc, self.sum, self.max],
            from: [from.acc.cast_const(), from.sum.cast_const(), from.max.cast_const()],
            rows,
            dim: self.dim,
        };
        // SAFETY: the caller's; the kernels are this machine's.
        unsafe { (kernels.fold)(&args) }
    }

    /// Row `r` as a partial: writes o and gives the lse. A row with a NaN weight is NaN throughout.
    ///
    /// # Safety
    /// `r` is a row of the shape and `o` is no longer than its accumulator.
    pub unsafe fn finish(&self, r: usize, o: &mut [f32]) -> f32 {
        // SAFETY: the caller's.
        let (acc, lanes, max) = unsafe {
            (
                std::slice::from_raw_parts(self.acc.add(r * self.dim), o.len()),
                std::slice::from_raw_parts(self.sum.add(r * SUM_LANES), SUM_LANES),
                *self.max.add(r),
            )
        };
        let sum: f64 = lanes.iter().map(|&x| f64::from(x)).sum();
        if sum == 0.0 {
            o.fill(0.0);
            return f32::NEG_INFINITY;
        }
        if !sum.is_finite() {
            o.fill(f32::NAN);
            return f32::NAN;
        }
        let divisor = sum as f32;
        for (o, &x) in o.iter_mut().zip(acc) {
            *o = x / divisor;
        }
        (f64::from(max) * std::f64::consts::LN_2 + sum.ln()) as f32
    }
}

/// The binary counter: closed leaves of equal size meet like the digits of a number that is counted up, so that the
/// rounding of a sum grows with the logarithm of its length.
#[derive(Debug)]
pub struct Counter {
    memory: *mut f32,
    shape: StateShape,
    full: u32,
}

impl Counter {
    /// An empty counter.
    ///
    /// # Safety
    /// `memory` holds LEVELS sets of the shape and is used by nobody else while the counter is.
    pub unsafe fn new(memory: *mut f32, shape: StateShape) -> Counter {
        Counter { memory, shape, full: 0 }
    }

    fn level(&self, level: usize) -> States {
        let floats = self.shape.floats().unwrap_or(0);
        // SAFETY: the memory holds LEVELS sets.
        unsafe { States::at(self.memory.add(level * floats), self.shape) }
    }

    /// Closes a leaf: takes `states` in and clears them, maxima kept.
    ///
    /// # Safety
    /// `states` has the counter's shape and is not part of it.
    pub unsafe fn close(&mut self, kernels: &Kernels, states: &States, rows: usize) {
        let mut level = 0;
        // SAFETY: the levels in use are distinct sets of the shape.
        unsafe {
            while self.full & 1 << level != 0 {
                states.fold(kernels, &self.level(level), rows);
                if level == LEVELS - 1 {
                    break;
                }
                self.full &= !(1 << level);
                level += 1;
            }
            self.level(level).copy_from(states, rows);
            self.full |= 1 << level;
            states.clear(rows, true);
        }
    }

    /// Ends the count: `states` takes in every level, the lowest first.
    ///
    /// # Safety
    /// As [`close`](Self::close).
    pub unsafe fn finish(&mut self, kernels: &Kernels, states: &States, rows: usize) {
        for level in (0..LEVELS).filter(|level| self.full & 1 << level != 0) {
            // SAFETY: as in `close`.
            unsafe { states.fold(kernels, &self.level(level), rows) };
        }
        self.full = 0;
    }
}
