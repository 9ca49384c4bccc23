//! Plain code: eight independent lanes, so that sums have the shape of the vector ones.

use super::half_float::{widen_f8_e4m3, widen_f8_e5m2, widen_f16};
use super::vector::{Simd, exp2_fraction};

/// No instruction set beyond the target's own.
#[derive(Clone, Copy)]
pub struct Scalar;

const N: usize = 8;

#[inline(always)]
fn map(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    a.map(f)
}

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY: needs no instruction set.
unsafe impl Simd for Scalar {
    type V = [f32; N];
    const LANES: usize = N;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; N]) {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[u16; N]>().read_unaligned() }.map(widen_f16)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[u16; N]>().read_unaligned() }.map(|h| f32::from_bits(u32::from(h) << 16))
    }
    #[inline(always)]
    unsafe fn load_int8(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[i8; N]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_f8_e4m3(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[u8; N]>().read_unaligned() }.map(widen_f8_e4m3)
    }
    #[inline(always)]
    unsafe fn load_f8_e5m2(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[u8; N]>().read_unaligned() }.map(widen_f8_e5m2)
    }
    #[inline(always)]
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> [f32; N] {
        let shift = if upper { 4 } else { 0 };
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes.
        unsafe { p.cast::<[u8; N]>().read_unaligned() }.map(|byte| f32::from(table[usize::from(byte >> shift & 15)]))
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> [f32; N] {
        // SAFETY: the contract of `Simd`: the pointer is valid for an f16.
        [widen_f16(unsafe { p.cast::<u16>().read_unaligned() }); N]
    }
    #[inline(always)]
    unsafe fn add_where(a: [f32; N], bits: u32, x: f32) -> [f32; N] {
        std::array::from_fn(|i| if bits >> i & 1 == 1 { a[i] + x } else { a[i] })
    }
    #[inline(always)]
    unsafe fn add(a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max_lane(v: [f32; N]) -> f32 {
        v.into_iter().fold(v[0], |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn div(a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn clamp(x: [f32; N], bound: f32) -> [f32; N] {
        map(x, |x| {
            let x = if x < -bound { -bound } else { x };
            if x > bound { bound } else { x }
        })
    }
    #[inline(always)]
    unsafe fn power_of_two(x: [f32; N]) -> [f32; N] {
        map(x, |x| f32::from_bits(((x as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn round(x: [f32; N]) -> [f32; N] {
        // Adding 1.5 * 2^23 rounds to a whole number.
        const ROUND: f32 = 12_582_912.0;
        map(x, |x| if x < -126.0 { -126.0 } else { (x + ROUND) - ROUND })
    }
    #[inline(always)]
    unsafe fn exp2_unless_hidden(x: [f32; N], whole: [f32; N], rest: [f32; N], score: [f32; N]) -> [f32; N] {
        // SAFETY: needs no instruction set.
        let y = unsafe { exp2_fraction::<Scalar>(rest) };
        std::array::from_fn(|i| {
            let power = f32::from_bits(((whole[i] as i32 + 127) as u32) << 23);
            if x[i] < -126.0 || score[i] == f32::NEG_INFINITY { 0.0 } else { y[i] * power }
        })
    }
    #[inline(always)]
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[[f32; N]; RT]; RQ], out: *mut f32, stride: usize) {
        for (q, row) in acc.iter().enumerate() {
            for (t, v) in row.iter().enumerate() {
                let (a, b) = ((v[0] + v[4]) + (v[2] + v[6]), (v[1] + v[5]) + (v[3] + v[7]));
                // SAFETY: the caller's out has RQ rows of RT floats.
                unsafe { *out.add(q * stride + t) = a + b };
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}
