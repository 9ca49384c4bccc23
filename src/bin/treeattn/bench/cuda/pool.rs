//! The memory that decode steps read from on a GPU.

use treeattn::attention::Dtype;
use treeattn::runtime::Buffer;

use super::driver::{Gpu, Stream};
use crate::outcome::Outcome;

/// Bytes, unless a case needs more.
pub const POOL: usize = 8 << 30;
/// As many where it is to be quick.
pub const QUICK_POOL: usize = 2 << 30;

/// Writes random numbers of a 16-bit type to the whole pool.
pub fn fill(gpu: &Gpu, stream: &Stream, pool: &Buffer, dtype: Dtype) -> Outcome<()> {
    let kernel = gpu.kernel("bench_fill", 0)?;
    let arguments = [pool.data() as u64, pool.bytes() as u64 / 4, u64::from(dtype == Dtype::Bf16)];
    // SAFETY: what the kernel takes; the pool outlives it, since it is waited for.
    stream.time(|| unsafe { kernel.launch(stream, gpu.card.multiprocessors as u32 * 4, 512, &arguments) })?;
    Ok(())
}
