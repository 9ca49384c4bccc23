//! AVX2 with FMA and F16C: 8 lanes.

use std::arch::x86_64::*;

use super::vector::{Simd, exp2_fraction};

/// AVX2, FMA, F16C.
#[derive(Clone, Copy)]
pub struct Avx2;

// SAFETY: the entry points that reach this are chosen only where the features are.
unsafe impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_columns(columns: [__m256; 4], to: *mut f32, pitch: usize) {
        let [a, b, c, d] = columns;
        // SAFETY: the contract of the method: there is room for four floats at each of 8 multiples; the instruction set is there.
        unsafe {
            // As AVX-512 does it.
            let pairs = |a, b| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)].map(|v| _mm256_castps_pd(v));
            let ([ab, ab_upper], [cd, cd_upper]) = (pairs(a, b), pairs(c, d));
            let fours = [
                _mm256_unpacklo_pd(ab, cd),
                _mm256_unpackhi_pd(ab, cd),
                _mm256_unpacklo_pd(ab_upper, cd_upper),
                _mm256_unpackhi_pd(ab_upper, cd_upper),
            ];
            for (i, four) in fours.into_iter().enumerate() {
                let four = _mm256_castpd_ps(four);
                _mm_storeu_ps(to.add(i * pitch), _mm256_castps256_ps128(four));
                _mm_storeu_ps(to.add((4 + i) * pitch), _mm256_extractf128_ps::<1>(four));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_int8(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f8_e4m3(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            // As AVX-512 does it where there is no VBMI.
            let halves = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
            let carried = _mm_add_epi16(halves, _mm_set1_epi16(1 << 7));
            let halves = _mm_xor_si128(halves, _mm_and_si128(carried, _mm_set1_epi16(1 << 14)));
            _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_f8_e5m2(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe { _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let bytes = _mm_loadl_epi64(p.cast());
            let bytes = if upper { _mm_srli_epi16::<4>(bytes) } else { bytes };
            let entries =
                _mm_shuffle_epi8(_mm_loadu_si128(table.as_ptr().cast()), _mm_and_si128(bytes, _mm_set1_epi8(15)));
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(entries))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const u8) -> __m256 {
        // SAFETY: the contract of `Simd`: the pointer is valid for an f16, and the instruction set is there.
        unsafe { _mm256_cvtph_ps(_mm_set1_epi16(p.cast::<i16>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn add_where(a: __m256, bits: u32, x: f32) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits as i32), lane), lane);
            _mm256_add_ps(a, _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max_lane(v: __m256) -> f32 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
            _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)))
        }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn clamp(x: __m256, bound: f32) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            // A NaN passes: both give their second operand then.
            let x = _mm256_max_ps(_mm256_set1_ps(-bound), x);
            _mm256_min_ps(_mm256_set1_ps(bound), x)
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(x: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    unsafe fn round(x: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            // A NaN passes: max gives its second operand then.
            let x = _mm256_max_ps(_mm256_set1_ps(-126.0), x);
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
    }
    #[inline(always)]
    unsafe fn exp2_unless_hidden(x: __m256, whole: __m256, rest: __m256, score: __m256) -> __m256 {
        // SAFETY: the contract of `Simd`: the instruction set is there.
        unsafe {
            let live = _mm256_cmp_ps::<_CMP_NEQ_UQ>(score, _mm256_set1_ps(f32::NEG_INFINITY));
            let enough = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(-126.0));
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
            let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
            _mm256_and_ps(_mm256_mul_ps(exp2_fraction::<Avx2>(rest), power), _mm256_and_ps(live, enough))
        }
    }
    #[inline(always)]
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[__m256; RT]; RQ], out: *mut f32, stride: usize) {
        const { assert!(RQ * RT == 8) };
        // SAFETY: the contract of `Simd`: the pointer is valid for the lanes, and the instruction set is there.
        unsafe {
            let at = |i: usize| acc[i / RT][i % RT];
            let quad = |j: usize| {
                let (ab, cd) = (_mm256_hadd_ps(at(4 * j), at(4 * j + 1)), _mm256_hadd_ps(at(4 * j + 2), at(4 * j + 3)));
                _mm256_hadd_ps(ab, cd)
            };
            let (low, high) = (quad(0), quad(1));
            let sums =
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high));
            if RT == 8 {
                _mm256_storeu_ps(out, sums);
            } else if RT == 4 {
                _mm_storeu_ps(out, _mm256_castps256_ps128(sums));
                _mm_storeu_ps(out.add(stride), _mm256_extractf128_ps::<1>(sums));
            } else {
                const { assert!(RT == 2 || RT == 4 || RT == 8) };
                let low = _mm_castps_pd(_mm256_castps256_ps128(sums));
                let high = _mm_castps_pd(_mm256_extractf128_ps::<1>(sums));
                _mm_storel_pd(out.cast(), low);
                _mm_storeh_pd(out.add(stride).cast(), low);
                _mm_storel_pd(out.add(2 * stride).cast(), high);
                _mm_storeh_pd(out.add(3 * stride).cast(), high);
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: the instruction set is there; asking never faults, whatever the address.
        // To the second cache: requests for the first are fewer at a time, and hold up the loads beside them.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
