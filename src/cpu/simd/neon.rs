//! NEON: 4 lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use super::vector::{Simd, exp2_fraction};

/// NEON.
#[derive(Clone, Copy)]
pub struct Neon;

// SAFETY: NEON is part of every AArch64 target that this is built for.
unsafe impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: float32x4_t) {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let halves = vld1_u16(p.cast());
            let wide: float32x4_t;
            // The intrinsic needs a later compiler than the crate asks for.
            asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) wide, in(vreg) halves, options(pure, nomem, nostack));
            wide
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vmaxq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn max_lane(v: float32x4_t) -> f32 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vmaxvq_f32(v) }
    }
    #[inline(always)]
    unsafe fn round(x: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vrndnq_f32(vmaxq_f32(vdupq_n_f32(-126.0), x)) }
    }
    #[inline(always)]
    unsafe fn exp2_unless_hidden(
        x: float32x4_t,
        whole: float32x4_t,
        rest: float32x4_t,
        score: float32x4_t,
    ) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let hidden = vceqq_f32(score, vdupq_n_f32(f32::NEG_INFINITY));
            let little = vcltq_f32(x, vdupq_n_f32(-126.0));
            let exponent = vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127));
            let power = vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent));
            let weight = vreinterpretq_u32_f32(vmulq_f32(exp2_fraction::<Neon>(rest), power));
            vreinterpretq_f32_u32(vbicq_u32(weight, vorrq_u32(hidden, little)))
        }
    }
    #[inline(always)]
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[float32x4_t; RT]; RQ], out: *mut f32, stride: usize) {
        const { assert!(RT % 4 == 0) };
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            for (q, row) in acc.iter().enumerate() {
                for t in (0..RT).step_by(4) {
                    let (ab, cd) = (vpaddq_f32(row[t], row[t + 1]), vpaddq_f32(row[t + 2], row[t + 3]));
                    vst1q_f32(out.add(q * stride + t), vpaddq_f32(ab, cd));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a hint; it reads nothing.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly)) }
    }
}
