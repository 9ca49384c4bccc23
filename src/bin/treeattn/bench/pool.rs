//! The memory that everything is read from: written once with random numbers, then walked through in turn, so that what
//! is read next has left the caches.

use half::{bf16, f16};
use treeattn::attention::Dtype;
use treeattn::device::{Executor, HostBuffer, Workers, available_cores};

use crate::outcome::Outcome;

/// Slots begin at multiples of this, bytes.
const SLOT_ALIGN: usize = 4096;
/// The pool's size is a multiple of this for any number of workers up to 64, bytes.
const SIZE_ALIGN: usize = 1 << 20;

/// A large buffer of random numbers, and the threads that fill and read it.
pub struct Pool {
    memory: HostBuffer,
    pub workers: Workers,
}

impl Pool {
    /// At least `bytes` of memory, every page written, and a worker a core.
    pub fn new(bytes: usize) -> Outcome<Pool> {
        let workers = Workers::new(available_cores(), "treeattn-bench", true)?;
        let pool = Pool { memory: HostBuffer::new(bytes.next_multiple_of(SIZE_ALIGN))?, workers };
        pool.fill(Dtype::F32)?;
        Ok(pool)
    }

    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    pub fn data(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    /// Worker `worker`'s part: where it begins and how long it is, a multiple of 4,096.
    pub fn part(&self, worker: usize) -> (*const u8, usize) {
        let bytes = self.bytes() / self.workers.threads() / SLOT_ALIGN * SLOT_ALIGN;
        (self.data().wrapping_add(worker * bytes), bytes)
    }

    /// How many pieces of `bytes` the pool holds, and the distance between them.
    pub fn slots(&self, bytes: usize) -> (usize, usize) {
        let stride = bytes.next_multiple_of(SLOT_ALIGN).max(SLOT_ALIGN);
        (self.bytes() / stride, stride)
    }

    /// Writes random numbers of `dtype` between -1 and 1 everywhere; of types that are no plain floats, small ones.
    pub fn fill(&self, dtype: Dtype) -> Outcome<()> {
        let base = self.memory.as_mut_ptr() as usize;
        let threads = self.workers.threads();
        self.workers.run(&|worker| {
            let words = self.bytes() / 8;
            let (begin, end) = (worker * words / threads, (worker + 1) * words / threads);
            // SAFETY: the words of the pool's own memory, each of them one worker's; nobody reads while it is filled.
            let words = unsafe { std::slice::from_raw_parts_mut((base as *mut u64).add(begin), end - begin) };
            let mut random = Random(worker as u64 + 1);
            match dtype {
                Dtype::F16 => words.fill_with(|| random.four(|x| f16::from_f32(x).to_bits())),
                Dtype::Bf16 => words.fill_with(|| random.four(|x| bf16::from_f32(x).to_bits())),
                Dtype::F32 => {
                    words.fill_with(|| u64::from(random.float().to_bits()) | u64::from(random.float().to_bits()) << 32)
                }
                // Whatever two bytes become a scale, it is a number of ordinary size.
                _ => words.fill_with(|| random.word() & 0x8f8f_8f8f_8f8f_8f8f | 0x2020_2020_2020_2020),
            }
        })?;
        Ok(())
    }
}

/// A fast generator (xorshift64*) of floats between -1 and 1.
pub struct Random(pub u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn four(&mut self, convert: impl Fn(f32) -> u16) -> u64 {
        (0..4).fold(0, |word, _| word << 16 | u64::from(convert(self.float())))
    }
}
