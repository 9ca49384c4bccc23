//! Open sums closed into f64.

use super::args::CloseArgs;
use crate::cpu::simd::vector::Simd;

/// Adds open sums to closed ones, each over 2^maximum of its row, and empties them. Nothing rounds but the additions in
/// f64. Plain loops: inside an entry point of `table` they are compiled for its instruction set.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn close<S: Simd>(a: &CloseArgs) {
    // SAFETY: rows stay below `rows` and elements below `width`.
    unsafe {
        for r in 0..a.rows {
            let (ours, theirs) = (*a.closed_max.add(r), *a.open_max.add(r));
            let (closed, open) = (a.closed.add(r * a.width), a.open.add(r * a.width));
            if ours == theirs {
                // The usual case: the maximum stood still.
                for i in (0..a.width).step_by(S::LANES) {
                    S::close(closed.add(i), open.add(i));
                }
                continue;
            }
            let max = ours.max(theirs);
            *a.closed_max.add(r) = max;
            let (f, g) = (power_of_two(ours, max), power_of_two(theirs, max));
            for i in 0..a.width {
                *closed.add(i) = *closed.add(i) * f + f64::from(*open.add(i)) * g;
                *open.add(i) = 0.0;
            }
        }
    }
}

/// What sums over 2^m are multiplied by to be over 2^max: 2^(m - max) for m <= max, integers both; or NaN.
#[inline(always)]
pub fn power_of_two(m: f32, max: f32) -> f64 {
    if m == max {
        1.0
    } else if m == f32::NEG_INFINITY {
        0.0
    } else {
        let d = f64::from(m) - f64::from(max);
        if d >= -1022.0 { f64::from_bits(((d as i64 + 1023) as u64) << 52) } else { 0.0 * d.abs() }
    }
}
