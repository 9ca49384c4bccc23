//! Vectors and codecs: what the kernels are written in.
//!
//! `vector` is the trait of an instruction set's vectors, implemented by `avx512`, `avx2`, `neon` and `scalar`; `codec`
//! widens the rows of a format. Everything is `#[inline(always)]` and ends up inside entry points that enable the
//! instruction set (`kernel::table`).
//!
//! A vector of keys or values meets as many multiply-adds as there are query heads to a kv head, so that with four of them
//! widening is what the formats below 16 bits differ in. Of 64 keys of 8 kv heads with 4 rows each, in cache, a core of Zen 5
//! computes scores and values in 5.2 us in int8 (f16 the same), 6.0 in f8_e5m2, 6.3 in q8_0, 6.5 in q4_0 and 6.4 in f8_e4m3; the
//! multiply-adds alone take 4.7. The multiplication by the scale of a block, half a cycle a vector, shares their units.
//! Tried there, with nothing to show for it: f8_e5m2 by one shuffle of bytes instead of a widening and a shift (6.3 us); f8_e4m3
//! by masked look-ups, of which LLVM makes blends (7.1 to 9.0); pairs of vectors on AVX2 (values of q8_0 7.0 us, 6.3 without).

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod codec;
mod half_float;
#[cfg(target_arch = "aarch64")]
pub mod neon;
pub mod scalar;
pub mod vector;

/// Asks for the cache line of `p`, which may be any address, with what every processor of the architecture has.
pub fn ask_for_line(p: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the instruction is part of SSE, which every x86-64 has; asking never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: every aarch64 has NEON; asking never faults, whatever the address.
    unsafe {
        use vector::Simd;
        neon::Neon::prefetch(p);
    }
    #[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = p;
}
