//! The vector operations that the kernels are written in, one implementation an instruction set, and the element types.
//!
//! Every method is `unsafe` for one reason: it may only run where its instruction set exists. The kernels are
//! `#[inline(always)]` and end up inside entry points that enable the features (see `kernels`).

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;
pub mod scalar;

/// Vectors of f32.
///
/// # Safety
/// Methods need the instruction set; pointers must be valid for the lanes that are read or written. No alignment is asked.
pub unsafe trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Its lanes; divides 16.
    const LANES: usize;

    /// The same value in every lane.
    unsafe fn splat(x: f32) -> Self::V;
    /// Loads LANES floats.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Stores LANES floats.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Loads and widens LANES f16, exactly.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// Loads and widens LANES bf16, exactly.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// a + b.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a * b.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once where the machine can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; either where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The largest lane; any lane where one is NaN.
    unsafe fn max_lane(v: Self::V) -> f32;
    /// The nearest whole number; anything below -126 may become -126. NaN stays NaN.
    unsafe fn round(x: Self::V) -> Self::V;
    /// 2^x for x <= 1, within 1 ulp, given as `whole` = round(x) and the rest between -1/2 and 1/2; 0 for x below -126; 0
    /// wherever `score` is -inf, whatever else is; NaN stays NaN.
    unsafe fn exp2_unless_hidden(x: Self::V, whole: Self::V, rest: Self::V, score: Self::V) -> Self::V;
    /// Sums the lanes of each accumulator: out[q * stride + t] = sum of acc[q][t]. RQ * RT is a multiple of LANES.
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[Self::V; RT]; RQ], out: *mut f32, stride: usize);
    /// Asks for the cache line of `p`; never faults.
    unsafe fn prefetch(p: *const u8);
}

/// 2^f - 1 = f (C[0] + C[1] f + ...) for |f| <= 1/2: minimax, relative error of 2^f below 0.05 * 2^-24.
pub const EXP2: [f32; 6] =
    [0.693_147_24, 0.240_226_52, 0.055_503_104, 0.009_617_693, 0.001_340_664_3, 0.000_155_946_76];

/// The polynomial of 2^f.
#[inline(always)]
pub unsafe fn exp2_fraction<S: Simd>(f: S::V) -> S::V {
    unsafe {
        let mut y = S::splat(EXP2[5]);
        for &c in EXP2[..5].iter().rev() {
            y = S::fma(y, f, S::splat(c));
        }
        S::fma(y, f, S::splat(1.0))
    }
}

/// An element type of q, k or v.
pub trait Element: Copy {
    /// Bytes.
    const SIZE: usize;
    /// Loads and widens LANES consecutive elements.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
    /// Loads and widens one element.
    ///
    /// # Safety
    /// `p` must be valid for SIZE bytes.
    unsafe fn load_one(p: *const u8) -> f32;
}

/// f32 elements.
#[derive(Clone, Copy)]
pub struct F32;
/// f16 elements.
#[derive(Clone, Copy)]
pub struct F16;
/// bf16 elements.
#[derive(Clone, Copy)]
pub struct Bf16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_one(p: *const u8) -> f32 {
        unsafe { p.cast::<f32>().read_unaligned() }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn load_one(p: *const u8) -> f32 {
        widen_f16(unsafe { p.cast::<u16>().read_unaligned() })
    }
}

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_one(p: *const u8) -> f32 {
        f32::from_bits(u32::from(unsafe { p.cast::<u16>().read_unaligned() }) << 16)
    }
}

/// Widens an f16, exactly, without a branch.
#[inline(always)]
pub fn widen_f16(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff) << 13;
    // 2^112 moves the exponent bias; a subnormal f16 is a subnormal f32 before it.
    let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let bits = if magnitude >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(bits | u32::from(h & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_exactly() {
        for h in 0..=u16::MAX {
            let (ours, wanted) = (widen_f16(h), half::f16::from_bits(h).to_f32());
            assert!(ours.to_bits() == wanted.to_bits() || (ours.is_nan() && wanted.is_nan()), "{h:#x}");
        }
    }
}
