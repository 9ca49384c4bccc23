//! Scores, or weights, of a tile multiplied by the scales of their keys or values.

use super::args::{ScaleArgs, TILE};
use crate::attention::finite_or_nan;
use crate::cpu::simd::vector::Simd;

/// `values[r][t] *= scales[t]`. A scale multiplies a dot product instead of each of its terms, and a weight instead of each
/// element of the value: one rounding each.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn scale<S: Simd>(a: &ScaleArgs) {
    // SAFETY: keys and rows stay below those of the arguments, and elements of a row below the next multiple of 16, at most TILE.
    unsafe {
        let mut scales = [0f32; TILE];
        for (t, scale) in scales.iter_mut().enumerate().take(a.keys) {
            *scale = finite_or_nan((*a.scales.add(t)).add(a.offset).cast::<f32>().read());
        }
        for r in 0..a.rows {
            let row = a.values.add(r * TILE);
            for t in (0..a.keys.next_multiple_of(16)).step_by(S::LANES) {
                S::store(row.add(t), S::mul(S::load(row.add(t)), S::load(scales.as_ptr().add(t))));
            }
        }
    }
}
