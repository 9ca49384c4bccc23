//! Weights of a tile: scores under a running maximum, exponentiated.

use super::args::{SUM_LANES, TILE, WeightArgs};
use super::merge::power_of_two;
use crate::cpu::simd::vector::Simd;

/// 2^22: a float from here on may have no bit for a half, so that its maximum is not rounded up. The product with a score must
/// then be rounded exactly as the maximum was; otherwise the difference of the largest score and the maximum is rounding alone,
/// and its power of two is arbitrary.
const INTEGERS_FROM: f32 = 4_194_304.0;

/// Turns scores into weights, raises the running maxima and adds to the sums of weights. True: some maxima are so far
/// from their origins that all scores are to be computed anew, from the origins as they are now.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn weights<S: Simd>(a: &WeightArgs) -> bool {
    // SAFETY: rows stay below `rows`, and elements of a row below the next multiple of 16 above `keys`, at most TILE.
    unsafe {
        let mut repeat = false;
        for r in 0..a.rows {
            let top = top::<S>(a, r);
            *a.tile_max.add(r) = top;
            repeat |= (top - origin::<S>(a, r) as f32).abs() > a.origin_range && top.is_finite();
        }
        if repeat && move_origins::<S>(a) {
            return true;
        }
        for r in 0..a.rows {
            let (before, top) = (*a.max.add(r), *a.tile_max.add(r));
            if top > before {
                rescale::<S>(a.open.add(r * (a.dim + SUM_LANES)), a.dim + SUM_LANES, power_of_two(before, top) as f32);
                *a.max.add(r) = top;
            }
        }
        let n = a.keys.next_multiple_of(16);
        let (high, low) = (S::splat(a.factor[0]), S::splat(a.factor[1]));
        for r in 0..a.rows {
            let row = a.scores.add(r * TILE);
            let sum = a.open.add(r * (a.dim + SUM_LANES) + a.dim);
            let max = *a.max.add(r);
            let (base, part) = exponent_base(origin::<S>(a, r), max);
            let (base, part) = (S::splat(base), S::splat(part));
            let integers = max.abs() >= INTEGERS_FROM;
            let mut total = S::load(sum);
            for t in (0..n).step_by(S::LANES) {
                let score = S::load(row.add(t));
                let (x, whole, rest) = if integers {
                    let x = S::add(S::mul(score, high), base);
                    let whole = S::round(x);
                    (x, whole, S::sub(x, whole))
                } else {
                    // The rest is computed apart from x: rounding it as x would cost a small weight more precision than its
                    // score has.
                    let small = S::fma(score, low, part);
                    let x = S::add(S::fma(score, high, base), small);
                    let whole = S::round(x);
                    (x, whole, S::add(S::fma(score, high, S::sub(base, whole)), small))
                };
                let weight = S::exp2_unless_hidden(x, whole, rest, score);
                S::store(row.add(t), weight);
                total = S::add(total, weight);
            }
            S::store(sum, total);
        }
        false
    }
}

/// The maximum that row `r` has with the scores of this tile, rounded up to a whole power of two.
///
/// # Safety
/// As [`weights`]; `r` is below `rows`.
#[inline(always)]
unsafe fn top<S: Simd>(a: &WeightArgs, r: usize) -> f32 {
    // SAFETY: a row of the arguments, up to the next multiple of 16 above `keys`.
    unsafe {
        let row = a.scores.add(r * TILE);
        let mut top = S::load(row);
        for t in (S::LANES..a.keys.next_multiple_of(16)).step_by(S::LANES) {
            top = S::max(top, S::load(row.add(t)));
        }
        let top = S::max_lane(top);
        let found = if *a.origin.add(r) == 0.0 {
            (top * a.factor[0]).ceil()
        } else {
            (origin::<S>(a, r) + f64::from(top) * sum(a.factor)).ceil() as f32
        };
        (*a.max.add(r)).max(found)
    }
}

/// Moves the origins of all rows to the maxima found. The maxima themselves have to wait for scores that are rounded
/// like those which they will be subtracted from. False: all are there already.
///
/// # Safety
/// As [`weights`].
#[inline(never)]
unsafe fn move_origins<S: Simd>(a: &WeightArgs) -> bool {
    let mut changed = false;
    for r in 0..a.rows {
        // SAFETY: a row of the arguments.
        let (top, origin) = unsafe { (*a.tile_max.add(r), &mut *a.origin.add(r)) };
        let lane = -top / (a.factor[0] * S::LANES as f32);
        // Integer maxima have a rounding of their own; below 1e-30 a lane might not hold it exactly.
        let fits = top.abs() < INTEGERS_FROM && lane.is_finite() && lane.abs() > 1e-30;
        let lane = if fits { lane } else { 0.0 };
        changed |= lane != *origin;
        *origin = lane;
    }
    changed
}

/// What the scores of row `r` are measured from, as a power of two.
///
/// # Safety
/// As [`weights`]; `r` is below `rows`.
#[inline(always)]
unsafe fn origin<S: Simd>(a: &WeightArgs, r: usize) -> f64 {
    // SAFETY: a row of the arguments.
    -f64::from(unsafe { *a.origin.add(r) }) * S::LANES as f64 * sum(a.factor)
}

/// The sum of two floats.
#[inline(always)]
fn sum(parts: [f32; 2]) -> f64 {
    f64::from(parts[0]) + f64::from(parts[1])
}

/// What is added to a score (measured from 2^`origin`) times the factor: a whole number, and the small part that is left.
#[inline(always)]
fn exponent_base(origin: f64, max: f32) -> (f32, f32) {
    if max == f32::NEG_INFINITY {
        // Nothing visible yet: every score is -inf (or NaN), and no maximum to subtract.
        return (0.0, 0.0);
    }
    let whole = origin.round_ties_even();
    ((whole - f64::from(max)) as f32, (origin - whole) as f32)
}

/// Multiplies `n` floats.
///
/// # Safety
/// `p` is valid for them; `n` is a multiple of the lanes; the instruction set of `S` is there.
#[inline(always)]
unsafe fn rescale<S: Simd>(p: *mut f32, n: usize, factor: f32) {
    // SAFETY: `n` floats are valid and a multiple of the lanes, so that every vector loaded and stored is inside them.
    unsafe {
        let f = S::splat(factor);
        for i in (0..n).step_by(S::LANES) {
            S::store(p.add(i), S::mul(S::load(p.add(i)), f));
        }
    }
}
