//! Float types: their spacing, and rounding to them.

use crate::attention::dtype::Dtype;

/// The element types that limit an output's precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// The output's.
    pub out: Dtype,
    /// That of partials on the wire; f32 where nothing is exchanged.
    pub wire: Dtype,
}

/// Bits of the significand, and the exponent of the smallest normal number, of a float type.
fn format_of(dtype: Dtype) -> (i32, i32) {
    match dtype {
        Dtype::F16 => (11, -14),
        Dtype::Bf16 => (8, -126),
        _ => (24, -126),
    }
}

/// The largest finite number of a float type (f32, f16, bf16).
fn top(dtype: Dtype) -> f64 {
    let (bits, lowest) = format_of(dtype);
    (2.0 - 2f64.powi(1 - bits)) * 2f64.powi(1 - lowest)
}

/// The spacing of numbers of a float type (f32, f16, bf16) around `x`; that of subnormals near 0.
pub fn ulp(x: f64, dtype: Dtype) -> f64 {
    let (bits, lowest) = format_of(dtype);
    // The exponent field; f64 subnormals and 0 fall below every `lowest`.
    let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).min(127);
    2f64.powi(exponent.max(lowest) - bits + 1)
}

/// `x` rounded once, to nearest even, to a float type (f32, f16, bf16).
pub fn round_to(x: f64, dtype: Dtype) -> f64 {
    if !x.is_finite() {
        return x;
    }
    let spacing = ulp(x, dtype);
    let rounded = (x / spacing).round_ties_even() * spacing;
    if rounded.abs() > top(dtype) { f64::INFINITY.copysign(x) } else { rounded }
}
