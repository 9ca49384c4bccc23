//! The merge of sums over powers of two.

use super::args::MergeArgs;
use crate::cpu::simd::vector::Simd;

/// Takes sums into others: numerators and denominators, each over 2^maximum of its row, with the rounding error of each
/// addition kept in its low part.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn merge<S: Simd>(a: &MergeArgs) {
    // SAFETY: rows stay below `rows` and elements below `width`; null low parts are not touched.
    unsafe {
        for r in 0..a.rows {
            let (ours, theirs) = (*a.to_max.add(r), *a.from_max.add(r));
            let max = ours.max(theirs);
            *a.to_max.add(r) = max;
            let at = r * a.width;
            if ours == theirs && a.from[1].is_null() {
                // The usual case: the maximum stood still.
                for i in (at..at + a.width).step_by(S::LANES) {
                    let (sum, lost) = exact_sum::<S>(S::load(a.to[0].add(i)), S::load(a.from[0].add(i)));
                    S::store(a.to[0].add(i), sum);
                    S::store(a.to[1].add(i), S::add(S::load(a.to[1].add(i)), lost));
                    S::store(a.from[0].add(i), S::splat(0.0));
                }
                continue;
            }
            let (f, g) = (S::splat(power_of_two(ours, max)), S::splat(power_of_two(theirs, max)));
            for i in (at..at + a.width).step_by(S::LANES) {
                let (x, y) = (S::mul(S::load(a.to[0].add(i)), f), S::mul(S::load(a.from[0].add(i)), g));
                let (sum, lost) = exact_sum::<S>(x, y);
                let mut rest = S::fma(S::load(a.to[1].add(i)), f, lost);
                if a.from[1].is_null() {
                    S::store(a.from[0].add(i), S::splat(0.0));
                } else {
                    rest = S::fma(S::load(a.from[1].add(i)), g, rest);
                }
                S::store(a.to[0].add(i), sum);
                S::store(a.to[1].add(i), rest);
            }
        }
    }
}

/// x + y, and what rounding took from it.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
unsafe fn exact_sum<S: Simd>(x: S::V, y: S::V) -> (S::V, S::V) {
    // SAFETY: the caller's.
    unsafe {
        let sum = S::add(x, y);
        let y_in = S::sub(sum, x);
        let x_in = S::sub(sum, y_in);
        (sum, S::add(S::sub(x, x_in), S::sub(y, y_in)))
    }
}

/// What sums over 2^m are multiplied by to be over 2^max: 2^(m - max) for m <= max, integers both; or NaN.
#[inline(always)]
pub fn power_of_two(m: f32, max: f32) -> f32 {
    if m == max {
        1.0
    } else if m == f32::NEG_INFINITY {
        0.0
    } else {
        let d = m - max;
        if d >= -126.0 { f32::from_bits(((d as i32 + 127) as u32) << 23) } else { 0.0 * d.abs() }
    }
}
