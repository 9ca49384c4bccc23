//! The read bandwidth of this machine: the best of several kernels that do nothing but load.

use std::hint::black_box;
use std::time::Instant;

use treeattn::cpu::Isa;
use treeattn::device::Executor;

use super::pool::Pool;
use super::samples::Samples;
use crate::outcome::Outcome;

/// Passes over the pool that choose the kernel.
const PASSES: usize = 3;
/// Bytes of a step of a kernel; parts and streams are multiples of it.
const STEP: usize = 512;

type Read = unsafe fn(*const u8, usize) -> u64;

/// A way to read memory. Called with memory of that many readable bytes, a multiple of 4 steps, where `isa` is there.
struct Kernel {
    name: &'static str,
    isa: Isa,
    read: Read,
}

/// The kernel that read fastest, and every pass it has made.
pub struct Ceiling {
    kernel: Kernel,
    /// Median bytes a second of each kernel when the best was chosen.
    pub kernels: Vec<(&'static str, f64)>,
    /// Bytes a second.
    samples: Samples,
}

impl Ceiling {
    /// Tries every kernel over the whole pool on all cores.
    pub fn measure(pool: &Pool) -> Outcome<Ceiling> {
        let mut tried = Vec::new();
        for kernel in kernels().into_iter().filter(|kernel| kernel.isa.is_available()) {
            let mut samples = Samples::default();
            for _ in 0..PASSES {
                samples.push(pass(pool, &kernel)?);
            }
            tried.push((kernel, samples));
        }
        let kernels = tried.iter().map(|(kernel, samples)| (kernel.name, samples.median())).collect();
        let best = tried.into_iter().max_by(|a, b| a.1.median().total_cmp(&b.1.median()));
        let (kernel, samples) = best.ok_or("no read kernel for this machine")?;
        Ok(Ceiling { kernel, kernels, samples })
    }

    /// One more pass of the best kernel; bytes a second.
    pub fn sample(&mut self, pool: &Pool) -> Outcome<f64> {
        let found = pass(pool, &self.kernel)?;
        self.samples.push(found);
        Ok(found)
    }

    /// The best kernel.
    pub fn kernel(&self) -> &'static str {
        self.kernel.name
    }

    /// Bytes a second.
    pub fn median(&self) -> f64 {
        self.samples.median()
    }

    /// The fastest pass, bytes a second.
    pub fn peak(&self) -> f64 {
        self.samples.maximum()
    }
}

/// Reads the pool once; bytes a second.
fn pass(pool: &Pool, kernel: &Kernel) -> Outcome<f64> {
    let parts: Vec<(usize, usize)> =
        (0..pool.workers.threads()).map(|worker| pool.part(worker)).map(|(data, n)| (data as usize, n)).collect();
    let begin = Instant::now();
    pool.workers.run(&|worker| {
        let (data, bytes) = parts[worker];
        // SAFETY: the part lies in the pool, begins at a multiple of 4,096 and is as many times 4,096 long, more than the
        // four steps that a kernel asks for; `measure` keeps only kernels whose instruction set this machine has.
        black_box(unsafe { (kernel.read)(data as *const u8, bytes) });
    })?;
    let bytes: usize = parts.iter().map(|part| part.1).sum();
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

fn kernels() -> Vec<Kernel> {
    #[cfg(target_arch = "x86_64")]
    let vectors = [
        Kernel { name: "avx512, 1 stream", isa: Isa::Avx512, read: x86::avx512::<1, 0> },
        Kernel { name: "avx512, 2 streams", isa: Isa::Avx512, read: x86::avx512::<2, 0> },
        Kernel { name: "avx512, 4 streams", isa: Isa::Avx512, read: x86::avx512::<4, 0> },
        Kernel { name: "avx512, 1 stream, prefetch", isa: Isa::Avx512, read: x86::avx512::<1, 4096> },
        Kernel { name: "avx512, 2 streams, prefetch", isa: Isa::Avx512, read: x86::avx512::<2, 2048> },
        Kernel { name: "avx2, 1 stream", isa: Isa::Avx2, read: x86::avx2::<1, 0> },
        Kernel { name: "avx2, 2 streams", isa: Isa::Avx2, read: x86::avx2::<2, 0> },
        Kernel { name: "avx2, 1 stream, prefetch", isa: Isa::Avx2, read: x86::avx2::<1, 4096> },
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let vectors = [];
    let plain = [
        Kernel { name: "plain, 1 stream", isa: Isa::Scalar, read: plain::<1> },
        Kernel { name: "plain, 2 streams", isa: Isa::Scalar, read: plain::<2> },
    ];
    plain.into_iter().chain(vectors).collect()
}

/// As the compiler vectorises it.
///
/// # Safety
/// `data` is aligned to 64 bytes and readable for `bytes`, a multiple of `STREAMS` steps.
unsafe fn plain<const STREAMS: usize>(data: *const u8, bytes: usize) -> u64 {
    let stream = bytes / STREAMS;
    let mut sums = [0u64; STEP / 8];
    for at in (0..stream).step_by(STEP) {
        for s in 0..STREAMS {
            // SAFETY: `at` is a multiple of a step below `stream` and `s` is below `STREAMS`, so the step ends within
            // the `bytes` that are readable; any bits are a u64, and steps keep the alignment of `data`.
            let step = unsafe { &*data.add(s * stream + at).cast::<[u64; STEP / 8]>() };
            for (sum, word) in sums.iter_mut().zip(step) {
                *sum ^= word;
            }
        }
    }
    sums.iter().fold(0, |sum, word| sum ^ word)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::STEP;

    macro_rules! kernel {
        ($(#[$doc:meta])* $name:ident, $features:literal, $vector:ty, $zero:ident, $load:ident, $xor:ident) => {
            $(#[$doc])*
            ///
            /// # Safety
            /// `data` is aligned to 64 bytes and readable for `bytes`, a multiple of `STREAMS` steps; the features are
            /// there.
            #[target_feature(enable = $features)]
            pub unsafe fn $name<const STREAMS: usize, const AHEAD: usize>(data: *const u8, bytes: usize) -> u64 {
                const LANES: usize = STEP / size_of::<$vector>();
                let stream = bytes / STREAMS;
                let mut sums = [$zero(); LANES];
                for at in (0..stream).step_by(STEP) {
                    for s in 0..STREAMS {
                        let step = data.wrapping_add(s * stream + at);
                        if AHEAD > 0 {
                            for line in (0..STEP).step_by(64) {
                                _mm_prefetch::<_MM_HINT_T0>(step.wrapping_add(AHEAD + line).cast());
                            }
                        }
                        for (lane, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: `at` is a multiple of a step below `stream` and `s` is below `STREAMS`, so the
                            // step ends within the `bytes` that are readable; lanes keep the alignment of `data`.
                            *sum = $xor(*sum, unsafe { $load(step.cast::<$vector>().add(lane)) });
                        }
                    }
                }
                let sum = sums.into_iter().fold($zero(), |sum, lane| $xor(sum, lane));
                let mut words = [0u64; size_of::<$vector>() / 8];
                // SAFETY: an array as large as the vector.
                unsafe { words.as_mut_ptr().cast::<$vector>().write_unaligned(sum) };
                words.iter().fold(0, |sum, word| sum ^ word)
            }
        };
    }

    kernel!(
        /// 64 bytes a load.
        avx512, "avx512f", __m512i, _mm512_setzero_si512, _mm512_load_si512, _mm512_xor_si512
    );
    kernel!(
        /// 32 bytes a load.
        avx2, "avx2", __m256i, _mm256_setzero_si256, _mm256_load_si256, _mm256_xor_si256
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use treeattn::device::HostBuffer;

    #[test]
    fn every_kernel_reads_every_byte() {
        let memory = HostBuffer::new(64 * STEP).unwrap();
        // SAFETY: the buffer is this long and nobody else has it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) };
        for kernel in kernels().iter().filter(|kernel| kernel.isa.is_available()) {
            for at in (0..bytes.len()).step_by(61) {
                bytes[at] = 1 << (at % 7);
                // SAFETY: aligned, that long, and the instruction set is there.
                let sum = unsafe { (kernel.read)(bytes.as_ptr(), bytes.len()) };
                assert_eq!(sum.to_ne_bytes()[at % 8], bytes[at], "{} at {at}", kernel.name);
                bytes[at] = 0;
            }
        }
    }
}
