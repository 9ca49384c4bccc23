//! Scores of a tile modified: capped, and with what is added to them.

use super::args::{ModifyArgs, TILE};
use crate::cpu::simd::vector::{Simd, exp2_fraction_less_one};

/// Where tanh is 1: at 2^40 of e^(2 |x|).
const SATURATED: f32 = 40.0;

/// Caps the scores and adds slopes times distances, factors times masks, and the bias.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn modify<S: Simd>(a: &ModifyArgs) {
    // SAFETY: rows stay below `rows`, and elements of a row below the next multiple of 16 above `keys`, at most TILE.
    unsafe {
        let n = a.keys.next_multiple_of(16);
        let (high, low, cap) = (S::splat(a.cap_factor[0]), S::splat(a.cap_factor[1]), S::splat(a.cap));
        for r in 0..a.rows {
            let row = a.scores.add(r * TILE);
            for t in (0..n).step_by(S::LANES) {
                let score = S::load(row.add(t));
                let mut sum = S::splat(0.0);
                if !a.biases.is_null() {
                    sum = S::mul(S::splat(a.bias_factor), S::load(a.biases.add(r * TILE + t)));
                }
                if !a.slopes.is_null() {
                    sum = S::fma(S::splat(*a.slopes.add(r)), S::load((*a.distances.add(r)).add(t)), sum);
                }
                if !a.masks.is_null() {
                    sum = S::fma(S::splat(*a.factors.add(r)), S::load((*a.masks.add(r)).add(t)), sum);
                }
                let modified = if a.cap > 0.0 {
                    S::fma(cap, tanh::<S>(S::fma(score, high, S::mul(score, low))), sum)
                } else {
                    S::add(score, sum)
                };
                S::store(row.add(t), modified);
            }
        }
    }
}

/// tanh(x ln 2 / 2), within 6 * 2^-24 of its magnitude; NaN of NaN. With e = 2^x it is (e - 1) / (e + 1), and e - 1 comes
/// of a polynomial that is exact where it is small.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
pub unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic on vectors, which asks for the instruction set alone.
    unsafe {
        let x = S::clamp(x, SATURATED);
        let whole = S::round(x);
        let power = S::power_of_two(whole);
        let less_one = exp2_fraction_less_one::<S>(S::sub(x, whole));
        let less_one = S::fma(less_one, power, S::sub(power, S::splat(1.0)));
        S::div(less_one, S::add(less_one, S::splat(2.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Kernels;
    use super::*;
    use crate::cpu::isa::Isa;

    /// tanh by the kernel: a cap of 1 over products, and nothing added.
    fn capped(isa: Isa, values: &mut [f32]) {
        let kernels = Kernels::of(isa).unwrap();
        for row in values.chunks_mut(TILE) {
            let args =
                ModifyArgs { cap: 1.0, cap_factor: [1.0, 0.0], ..ModifyArgs::of(row.as_mut_ptr(), 1, row.len()) };
            // SAFETY: a row of whole vectors; the instruction set is there, since it has kernels.
            unsafe { (kernels.modify)(&args) };
        }
    }

    #[test]
    fn tanh_is_within_its_bound_everywhere() {
        for isa in Isa::available() {
            let (mut worst, mut bits) = (0f64, 1u32);
            while f32::from_bits(bits) < 100.0 {
                let args: Vec<f32> = (0..64)
                    .map(|i| f32::from_bits(bits + i * 0x407) * if i.is_multiple_of(2) { 1.0 } else { -1.0 })
                    .collect();
                let mut found = args.clone();
                capped(isa, &mut found);
                for (&x, found) in args.iter().zip(found) {
                    let wanted = (f64::from(x) * std::f64::consts::LN_2 / 2.0).tanh();
                    let error = (f64::from(found) - wanted).abs() - 2f64.powi(-148);
                    worst = worst.max(error / wanted.abs());
                }
                bits += 64 * 0x407 + 123;
            }
            println!("{}: at most {:.2} * 2^-24", isa.name(), worst * 2f64.powi(24));
            assert!(worst <= 6.0 * 2f64.powi(-24), "{}: {worst:e}", isa.name());
            let mut special = [0.0; 16];
            special[..7].copy_from_slice(&[f32::NAN, 3e38, -3e38, 0.0, -0.0, 1e30, -1e30]);
            capped(isa, &mut special);
            assert!(special[0].is_nan());
            assert_eq!(special[1..7], [1.0, -1.0, 0.0, 0.0, 1.0, -1.0], "{}", isa.name());
        }
    }

    #[test]
    fn what_is_added_comes_after_the_cap() {
        let (distances, mask) = ([3f32; TILE], [2f32; TILE]);
        let (distances, masks) = ([distances.as_ptr(); 2], [mask.as_ptr(); 2]);
        let (slopes, factors, biases) = ([-0.5f32, 0.0], [4f32, -1.0], [8f32; 2 * TILE]);
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).unwrap();
            for cap in [0.0, 10.0] {
                let mut scores = [1e9f32; 2 * TILE];
                let args = ModifyArgs {
                    cap,
                    cap_factor: [1.0, 0.0],
                    slopes: slopes.as_ptr(),
                    distances: distances.as_ptr(),
                    factors: factors.as_ptr(),
                    masks: masks.as_ptr(),
                    biases: biases.as_ptr(),
                    bias_factor: 0.25,
                    ..ModifyArgs::of(scores.as_mut_ptr(), 2, 20)
                };
                // SAFETY: two rows; the instruction set is there, since it has kernels.
                unsafe { (kernels.modify)(&args) };
                let score = if cap > 0.0 { cap } else { 1e9 };
                assert_eq!((scores[0], scores[TILE + 31]), (score + 8.5, score));
                assert_eq!(scores[32], 1e9, "past the keys");
            }
        }
    }
}
