//! The limits of arithmetic: fused multiply-adds that touch no memory, on all cores.

use std::hint::black_box;
use std::time::Instant;

use treeattn::cpu::Isa;
use treeattn::device::{Executor, Workers};

use super::samples::Samples;
use crate::outcome::Outcome;

/// Times round the loop of a sample.
const TURNS: usize = 200_000;

/// A loop of independent multiply-adds; gives a number that depends on all of them.
type Run = unsafe fn(usize) -> f32;

/// One kind of multiply-add on one instruction set.
struct Kernel {
    name: &'static str,
    isa: Isa,
    /// The kernel is needed with this, beyond the instruction set.
    available: fn() -> bool,
    run: Run,
    /// Floating-point operations of a turn.
    flops: usize,
}

/// The arithmetic limit of one instruction set, sampled in the course of a run.
pub struct Limit {
    kernel: Kernel,
    /// Operations a second, all cores.
    samples: Samples,
}

impl Limit {
    /// The limits of all instruction sets of this machine.
    pub fn all() -> Vec<Limit> {
        let here = kernels().into_iter().filter(|kernel| kernel.isa.is_available() && (kernel.available)());
        here.map(|kernel| Limit { kernel, samples: Samples::default() }).collect()
    }

    /// What it is a limit of, such as "avx512 fp32 FMA".
    pub fn name(&self) -> &'static str {
        self.kernel.name
    }

    /// Whether it is the fp32 limit of `isa`.
    pub fn is_fma_of(&self, isa: Isa) -> bool {
        self.kernel.isa == isa && !self.kernel.name.contains("dot")
    }

    pub fn sample(&mut self, workers: &Workers) -> Outcome<()> {
        let begin = Instant::now();
        workers.run(&|_| {
            // SAFETY: `all` keeps only kernels whose instruction set and further features this machine has.
            black_box(unsafe { (self.kernel.run)(black_box(TURNS)) });
        })?;
        let flops = (self.kernel.flops * TURNS * workers.threads()) as f64;
        self.samples.push(flops / begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// Operations a second.
    pub fn median(&self) -> f64 {
        self.samples.median()
    }

    /// The best sample, operations a second.
    pub fn peak(&self) -> f64 {
        self.samples.maximum()
    }
}

fn kernels() -> Vec<Kernel> {
    let always: fn() -> bool = || true;
    #[cfg(target_arch = "x86_64")]
    let vectors = [
        Kernel { name: "avx2 fp32 FMA", isa: Isa::Avx2, available: always, run: x86::avx2, flops: 12 * 8 * 2 },
        Kernel { name: "avx512 fp32 FMA", isa: Isa::Avx512, available: always, run: x86::avx512, flops: 24 * 16 * 2 },
        Kernel {
            name: "avx512 bf16 dot",
            isa: Isa::Avx512,
            available: || is_x86_feature_detected!("avx512bf16"),
            run: x86::bf16_dot,
            flops: 24 * 32 * 2,
        },
    ];
    #[cfg(target_arch = "aarch64")]
    let vectors =
        [Kernel { name: "neon fp32 FMA", isa: Isa::Neon, available: always, run: arm::neon, flops: 24 * 4 * 2 }];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let vectors = [];
    let plain =
        Kernel { name: "plain fp32 multiply, add", isa: Isa::Scalar, available: always, run: plain, flops: 40 * 2 };
    std::iter::once(plain).chain(vectors).collect()
}

/// As the compiler vectorises it for any machine of the architecture.
///
/// # Safety
/// None needed.
unsafe fn plain(turns: usize) -> f32 {
    let (factor, term) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [[0.5f32; 4]; 10];
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = sum.map(|x| x * factor + term);
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// 12 chains of 8 floats.
    ///
    /// # Safety
    /// The features are there.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(turns: usize) -> f32 {
        let (factor, term) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(0.5); 12];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, term);
            }
        }
        let sum = sums.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b));
        _mm256_cvtss_f32(sum)
    }

    /// 24 chains of 16 floats.
    ///
    /// # Safety
    /// The features are there.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(turns: usize) -> f32 {
        let (factor, term) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(0.5); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, term);
            }
        }
        let sum = sums.into_iter().fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b));
        _mm512_cvtss_f32(sum)
    }

    /// 24 chains of 16 sums of two products.
    ///
    /// # Safety
    /// The features are there.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn bf16_dot(turns: usize) -> f32 {
        let factor = _mm512_set1_ps(black_box(0.001));
        let factors = _mm512_cvtne2ps_pbh(factor, factor);
        let mut sums = [_mm512_set1_ps(0.5); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factors, factors);
            }
        }
        let sum = sums.into_iter().fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b));
        _mm512_cvtss_f32(sum)
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    /// 24 chains of 4 floats.
    ///
    /// # Safety
    /// The features are there.
    #[target_feature(enable = "neon")]
    pub unsafe fn neon(turns: usize) -> f32 {
        let (factor, term) = (vdupq_n_f32(black_box(0.001)), vdupq_n_f32(black_box(0.999)));
        let mut sums = [vdupq_n_f32(0.5); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, factor, term);
            }
        }
        let sum = sums.into_iter().fold(vdupq_n_f32(0.0), |a, b| vaddq_f32(a, b));
        vaddvq_f32(sum)
    }
}
