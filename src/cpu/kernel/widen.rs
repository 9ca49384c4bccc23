//! Rows widened to packed f32.

use super::args::{TILE, WidenArgs};
use super::prefetch::LINE;
use crate::cpu::simd::codec::Codec;
use crate::cpu::simd::vector::Simd;

/// Columns that are widened together: elements of as many rows as a vector has lanes.
const COLUMNS: usize = 4;

/// Widens rows to packed f32, zero-padded to a multiple of 16 elements. Serves any stride along the row. Rows that lie an element
/// apart, as in a transposed cache, are read by columns.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn widen<S: Simd, E: Codec>(a: &WidenArgs) {
    // SAFETY: rows stay below `count`.
    unsafe {
        let by_columns = E::FORMAT.block_elements() == 1 && !E::FORMAT.is_packed(a.stride);
        let mut t = 0;
        while t < a.count {
            let run = if by_columns { adjacent_rows(a, t, E::FORMAT.block_bytes()) / S::LANES * S::LANES } else { 0 };
            if run > 0 {
                widen_columns::<S, E>(a, t, run);
            } else {
                widen_row::<S, E>(a, t);
            }
            t += run.max(1);
        }
    }
}

/// How many rows from `first` on lie `bytes` apart.
///
/// # Safety
/// As [`widen`]; `first` is below `count`.
#[inline(always)]
unsafe fn adjacent_rows(a: &WidenArgs, first: usize, bytes: usize) -> usize {
    // SAFETY: the rows are there, as this function was promised.
    unsafe {
        let from = (*a.rows.add(first)).addr();
        (1..a.count - first).take_while(|t| (*a.rows.add(first + t)).addr() == from + t * bytes).count() + 1
    }
}

/// Widens a row.
///
/// # Safety
/// As [`widen`]; `t` is below `count`.
#[inline(always)]
unsafe fn widen_row<S: Simd, E: Codec>(a: &WidenArgs, t: usize) {
    // SAFETY: elements read below `dim`, those written below the padded one.
    unsafe {
        let padded = a.dim.next_multiple_of(16);
        let from = (*a.rows.add(t)).add(a.offset);
        let to = a.out.add(t * padded);
        let mut d = 0;
        let n = E::FORMAT.block_elements();
        if n > 1 {
            // Rows end where blocks do, and blocks where vectors do.
            while d < a.dim {
                let block = from.offset((d / n) as isize * a.stride as isize);
                S::store(to.add(d), E::load::<S>(block, d % n));
                d += S::LANES;
            }
        } else if E::FORMAT.is_packed(a.stride) {
            while d + S::LANES <= a.dim {
                S::store(to.add(d), E::load::<S>(from, d));
                d += S::LANES;
            }
        }
        while d < a.dim {
            *to.add(d) = E::load_one(from, a.stride, d);
            d += 1;
        }
        while d < padded {
            *to.add(d) = 0.0;
            d += 1;
        }
    }
}

/// Widens rows that lie an element apart, by columns: an element of LANES rows is a vector. Asks for the same columns of the next
/// tile, for a processor does not follow so many streams by itself.
///
/// # Safety
/// As [`widen`]; there are `count` rows from `first` on, a multiple of LANES, and they lie an element apart.
#[inline(always)]
unsafe fn widen_columns<S: Simd, E: Codec>(a: &WidenArgs, first: usize, count: usize) {
    // SAFETY: elements read below `dim` of the rows, those written below the padded one.
    unsafe {
        let (padded, bytes) = (a.dim.next_multiple_of(16), E::FORMAT.block_bytes());
        let from = (*a.rows.add(first)).add(a.offset);
        let to = a.out.add(first * padded);
        let whole = a.dim / COLUMNS * COLUMNS;
        for d in (0..whole).step_by(COLUMNS) {
            let column: [_; COLUMNS] = std::array::from_fn(|i| from.offset((d + i) as isize * a.stride as isize));
            for t in (0..count).step_by(S::LANES) {
                if t * bytes % LINE == 0 {
                    column.iter().for_each(|column| S::prefetch(column.wrapping_add((t + TILE) * bytes)));
                }
                S::store_columns(
                    column.map(|column| E::load::<S>(column.add(t * bytes), 0)),
                    to.add(t * padded + d),
                    padded,
                );
            }
        }
        for t in 0..count {
            for d in whole..padded {
                let element = if d < a.dim { E::load_one(from.add(t * bytes), a.stride, d) } else { 0.0 };
                *to.add(t * padded + d) = element;
            }
        }
    }
}
