//! The memory that decode steps read from on a GPU.

use treeattn::attention::{Dtype, KvFormat};
use treeattn::runtime::Buffer;

use super::driver::{Gpu, Stream};
use crate::bench::pool::Random;
use crate::outcome::Outcome;

/// Bytes, unless a case needs more.
pub const POOL: usize = 8 << 30;
/// As many where it is to be quick.
pub const QUICK_POOL: usize = 2 << 30;

/// Writes random numbers of a 16-bit type to the whole pool.
pub fn fill(gpu: &Gpu, stream: &Stream, pool: &Buffer, dtype: Dtype) -> Outcome<()> {
    let kernel = gpu.kernel("bench_fill", 0)?;
    let arguments = [pool.data() as u64, pool.bytes() as u64 / 4, u64::from(dtype == Dtype::Bf16)];
    // SAFETY: the three arguments of the kernel, over as many words as the pool has; `time` waits for it, and `gpu` and `pool`
    // are borrowed meanwhile.
    stream.time(|| unsafe { kernel.launch(stream, gpu.card.multiprocessors as u32 * 4, 512, &arguments) })?;
    Ok(())
}

/// Random numbers of a float type, as bytes.
pub fn numbers(dtype: Dtype, count: usize) -> Vec<u8> {
    let (mut random, format) = (Random(11), KvFormat::of(dtype));
    let values: Vec<f32> = (0..count).map(|_| 1.7 * random.float()).collect();
    let mut bytes = vec![0; format.row_bytes(count)];
    format.narrow_row(&values, &mut bytes);
    bytes
}

/// Writes random rows of any type to the whole pool, the same ones again and again.
pub fn fill_rows(pool: &Buffer, dtype: Dtype) -> Outcome<()> {
    // Whole blocks, and so whole rows, of each type.
    const ELEMENTS: usize = 1 << 22;
    let mut rows = numbers(dtype, ELEMENTS);
    if dtype == Dtype::Int8 {
        let mut random = Random(11);
        rows = (0..ELEMENTS).map(|_| (100.0 * random.float()) as i8 as u8).collect();
    }
    let mut at = 0;
    while at < pool.bytes() {
        let bytes = rows.len().min(pool.bytes() - at);
        pool.upload(at, &rows[..bytes])?;
        at += bytes;
    }
    Ok(())
}
