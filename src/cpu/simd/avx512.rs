//! AVX-512 F, BW, DQ, VL: 16 lanes.

use std::arch::x86_64::*;

use super::vector::{Simd, exp2_fraction};

/// The bf16 of every f8_e4m3 without its sign: all lower bytes, then all upper ones.
const E4M3_AS_BF16: [[u8; 128]; 2] = {
    let mut table = [[0; 128]; 2];
    let mut code = 1;
    while code < 128 {
        let (exponent, mantissa) = (code as u16 >> 3, code as u16 & 7);
        let half = if code == 0x7f {
            0x7fc0
        } else if exponent > 0 {
            (exponent + 120) << 7 | mantissa << 4
        } else {
            // Below the normal numbers the mantissa counts 2^-9; `top` is its leading bit.
            let top = mantissa.ilog2() as u16;
            (118 + top) << 7 | mantissa << (7 - top) & 0x7f
        };
        [table[0][code], table[1][code]] = half.to_le_bytes();
        code += 1;
    }
    table
};

/// 0, 0, 16, 16, 1, 1, 17, 17 and so on.
const TWICE: [u8; 64] = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 64 {
        order[i] = (i / 4 + i / 2 % 2 * 16) as u8;
        i += 1;
    }
    order
};

/// AVX-512.
#[derive(Clone, Copy)]
pub struct Avx512;

// SAFETY: the entry points that reach this are chosen only where the features are.
unsafe impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_columns(columns: [__m512; 4], to: *mut f32, pitch: usize) {
        let [a, b, c, d] = columns;
        // SAFETY: the contract of the method: there is room for four floats at each of 16 multiples; the instruction set is there.
        unsafe {
            let pairs = |a, b| [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)].map(|v| _mm512_castps_pd(v));
            let ([ab, ab_upper], [cd, cd_upper]) = (pairs(a, b), pairs(c, d));
            // In quarter j of vector i: a, b, c and d of lane 4 j + i.
            let fours = [
                _mm512_unpacklo_pd(ab, cd),
                _mm512_unpackhi_pd(ab, cd),
                _mm512_unpacklo_pd(ab_upper, cd_upper),
                _mm512_unpackhi_pd(ab_upper, cd_upper),
            ];
            for (i, four) in fours.into_iter().enumerate() {
                let four = _mm512_castpd_ps(four);
                _mm_storeu_ps(to.add(i * pitch), _mm512_castps512_ps128(four));
                _mm_storeu_ps(to.add((4 + i) * pitch), _mm512_extractf32x4_ps::<1>(four));
                _mm_storeu_ps(to.add((8 + i) * pitch), _mm512_extractf32x4_ps::<2>(four));
                _mm_storeu_ps(to.add((12 + i) * pitch), _mm512_extractf32x4_ps::<3>(four));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        // Said with the current direction, which does not matter here, the instruction takes its operand from memory.
        unsafe { _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_int8(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f8_e4m3(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            // An f16 of the same bits has an exponent that is 8 too small. Its uppermost bit is a copy of the sign so far:
            // cleared, but set for a NaN, whose other bits are all set, so that 1 added to them comes to be carried there.
            let halves = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            let carried = _mm256_add_epi16(halves, _mm256_set1_epi16(1 << 7));
            // halves ^ (carried & the bit).
            let halves = _mm256_ternarylogic_epi32::<0x78>(halves, carried, _mm256_set1_epi16(1 << 14));
            _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_f8_e4m3_pair(p: *const u8) -> [__m512; 2] {
        // SAFETY: the contract of the method: the pointer is valid for both vectors, and VBMI is there, too.
        unsafe {
            let table = |byte: usize, i: usize| _mm512_loadu_si512(E4M3_AS_BF16[byte].as_ptr().add(i * 64).cast());
            let codes = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
            // In lane i: element i twice, and twice element i + 16.
            let codes = _mm512_permutexvar_epi8(_mm512_loadu_si512(TWICE.as_ptr().cast()), codes);
            // An index counts by its lower seven bits.
            let lower = _mm512_permutex2var_epi8(table(0, 0), codes, table(0, 1));
            let upper = _mm512_permutex2var_epi8(table(1, 0), codes, table(1, 1));
            // In each half of a lane: of `upper` the upper byte, of `lower` the other; then the sign.
            let pair = _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(0xff00u16 as i16), upper, lower);
            let pair = _mm512_ternarylogic_epi32::<0xf8>(pair, codes, _mm512_set1_epi16(i16::MIN));
            let second = _mm512_and_si512(pair, _mm512_set1_epi32(0xffff_0000u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair)), _mm512_castsi512_ps(second)]
        }
    }
    #[inline(always)]
    unsafe fn load_f8_e5m2(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(bytes))
        }
    }
    #[inline(always)]
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            let bytes = if upper { _mm_srli_epi16::<4>(bytes) } else { bytes };
            let entries =
                _mm_shuffle_epi8(_mm_loadu_si128(table.as_ptr().cast()), _mm_and_si128(bytes, _mm_set1_epi8(15)));
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(entries))
        }
    }
    #[inline(always)]
    unsafe fn load_entry_pair(table: &[i8; 16], p: *const u8, scale: __m512) -> [__m512; 2] {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            // The table is multiplied instead of what is found there; an index counts by its lower four bits.
            let table = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(table.as_ptr().cast())));
            let table = _mm512_mul_ps(table, scale);
            let lower = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let upper = _mm512_srli_epi32::<4>(lower);
            [_mm512_permutexvar_ps(lower, table), _mm512_permutexvar_ps(upper, table)]
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> __m512 {
        // SAFETY: the contract of `Simd`: the pointer is valid for an f16, and the instruction set is there.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(p.cast::<i16>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn add_where(a: __m512, bits: u32, x: f32) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_mask_add_ps(a, bits as __mmask16, a, _mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max_lane(v: __m512) -> f32 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn clamp(x: __m512, bound: f32) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            // A NaN passes: both give their second operand then.
            let x = _mm512_max_ps(_mm512_set1_ps(-bound), x);
            _mm512_min_ps(_mm512_set1_ps(bound), x)
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(x: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), x) }
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn exp2_unless_hidden(x: __m512, whole: __m512, rest: __m512, score: __m512) -> __m512 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let live = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(score, _mm512_set1_ps(f32::NEG_INFINITY));
            let enough = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(live & enough, exp2_fraction::<Avx512>(rest), whole)
        }
    }
    #[inline(always)]
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[__m512; RT]; RQ], out: *mut f32, stride: usize) {
        const { assert!(RQ * RT == 16) };
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            // Four by four: lane group g of quad[j] holds the four partial sums of accumulators 4j to 4j + 3.
            let mut quad = [_mm512_setzero_ps(); 4];
            for (j, quad) in quad.iter_mut().enumerate() {
                let (a, b) = (acc[4 * j / RT][4 * j % RT], acc[(4 * j + 1) / RT][(4 * j + 1) % RT]);
                let (c, d) = (acc[(4 * j + 2) / RT][(4 * j + 2) % RT], acc[(4 * j + 3) / RT][(4 * j + 3) % RT]);
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
                *quad = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            }
            let half = |a: __m512, b: __m512| {
                _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
            };
            let (low, high) = (half(quad[0], quad[1]), half(quad[2], quad[3]));
            let sums = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(low, high),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(low, high),
            );
            if RT == 16 {
                _mm512_storeu_ps(out, sums);
            } else if RT == 8 {
                _mm256_storeu_ps(out, _mm512_castps512_ps256(sums));
                _mm256_storeu_ps(out.add(stride), _mm512_extractf32x8_ps::<1>(sums));
            } else {
                const { assert!(RT == 4 || RT == 8 || RT == 16) };
                _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
                _mm_storeu_ps(out.add(stride), _mm512_extractf32x4_ps::<1>(sums));
                _mm_storeu_ps(out.add(2 * stride), _mm512_extractf32x4_ps::<2>(sums));
                _mm_storeu_ps(out.add(3 * stride), _mm512_extractf32x4_ps::<3>(sums));
            }
        }
    }
    #[inline(always)]
    unsafe fn close(closed: *mut f64, open: *mut f32) {
        // SAFETY: the contract of `Simd`: the pointers are valid for the lanes, and the instruction set is there.
        unsafe {
            // The compiler would take half as wide vectors, and many more instructions.
            let sums = _mm512_loadu_ps(open);
            let low = _mm512_cvtps_pd(_mm512_castps512_ps256(sums));
            let high = _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(sums));
            _mm512_storeu_pd(closed, _mm512_add_pd(_mm512_loadu_pd(closed), low));
            _mm512_storeu_pd(closed.add(8), _mm512_add_pd(_mm512_loadu_pd(closed.add(8)), high));
            _mm512_storeu_ps(open, _mm512_setzero_ps());
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: the instruction set is there; asking never faults, whatever the address.
        // To the second cache: requests for the first are fewer at a time, and hold up the loads beside them.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
