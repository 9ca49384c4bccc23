//! Vectors and codecs: what the kernels are written in.
//!
//! `vector` is the trait of an instruction set's vectors, implemented by `avx512`, `avx2`, `neon` and `scalar`; `codec`
//! widens the rows of a format. Everything is `#[inline(always)]` and ends up inside entry points that enable the
//! instruction set (`kernel::table`).
//!
//! A vector of keys or values meets as many multiply-adds as there are query heads to a kv head, so that with four of them
//! widening is what the formats below 16 bits differ in, also where the cache comes from memory; README has what each takes.
//! The multiplication by the scale of a block shares the units of the multiply-adds. Tried on Zen 5 without a gain: f8_e5m2 by one
//! shuffle of bytes instead of a widening and a shift; f8_e4m3 by masked look-ups, of which LLVM makes blends; pairs of vectors
//! on AVX2.

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
