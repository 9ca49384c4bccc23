//! Vectors and codecs: what the kernels are written in.
//!
//! `vector` is the trait of an instruction set's vectors, implemented by `avx512`, `avx2`, `neon` and `scalar`; `codec`
//! widens the rows of a format. Everything is `#[inline(always)]` and ends up inside entry points that enable the
//! instruction set (`kernel::table`).

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
