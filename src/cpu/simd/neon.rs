//! NEON: 4 lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use super::vector::{Simd, exp2_fraction};

/// NEON.
#[derive(Clone, Copy)]
pub struct Neon;

/// Four f16, widened.
///
/// # Safety
/// NEON is there.
#[inline(always)]
unsafe fn widen_halves(halves: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: one instruction of NEON on registers. The intrinsic needs a later compiler than the crate asks for.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) wide, in(vreg) halves, options(pure, nomem, nostack));
    }
    wide
}

/// Four int8, the first in the lowest byte, widened.
///
/// # Safety
/// NEON is there.
#[inline(always)]
unsafe fn widen_bytes(bytes: u32) -> float32x4_t {
    // SAFETY: NEON is there.
    unsafe {
        let words = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))
    }
}

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
        unsafe { widen_halves(vld1_u16(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_int8(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { widen_bytes(p.cast::<u32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_f8_e4m3(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            // An f16 of the same bits has an exponent that is 8 too small.
            let halves = vreinterpretq_u16_s16(vshlq_n_s16::<7>(vmovl_s8(bytes)));
            let halves = vget_low_u16(vandq_u16(halves, vdupq_n_u16(0xbfff)));
            let nan = vceq_u16(vand_u16(halves, vdup_n_u16(0x3f80)), vdup_n_u16(0x3f80));
            vmulq_n_f32(widen_halves(vorr_u16(halves, nan)), 256.0)
        }
    }
    #[inline(always)]
    unsafe fn load_f8_e5m2(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = vreinterpret_u8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            widen_halves(vget_low_u16(vshll_n_u8::<8>(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = vreinterpret_u8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            let bytes = if upper { vshr_n_u8::<4>(bytes) } else { vand_u8(bytes, vdup_n_u8(15)) };
            let entries = vqtbl1_s8(vld1q_s8(table.as_ptr()), bytes);
            widen_bytes(vget_lane_u32::<0>(vreinterpret_u32_s8(entries)))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the pointer is valid for an f16, and the instruction set is there.
        unsafe { widen_halves(vdup_n_u16(p.cast::<u16>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn add_where(a: float32x4_t, bits: u32, x: f32) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let lane = vld1q_u32([1, 2, 4, 8].as_ptr());
            let set = vtstq_u32(vdupq_n_u32(bits), lane);
            vaddq_f32(a, vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(vdupq_n_f32(x)))))
        }
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
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn clamp(x: float32x4_t, bound: f32) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { vminq_f32(vdupq_n_f32(bound), vmaxq_f32(vdupq_n_f32(-bound), x)) }
    }
    #[inline(always)]
    unsafe fn power_of_two(x: float32x4_t) -> float32x4_t {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        }
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
