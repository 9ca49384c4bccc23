//! The read bandwidth of a GPU: the best of several kernels that do nothing but read.

use treeattn::runtime::Buffer;

use super::driver::{Gpu, Kernel, Stream};
use crate::bench::samples::Samples;
use crate::outcome::Outcome;

/// Bytes of a pass, where there is room.
pub const BYTES: usize = 4 << 30;
/// Passes that choose the kernel.
const PASSES: usize = 4;

/// A kernel and how it is launched.
struct Reader {
    name: String,
    kernel: Kernel,
    grid: u32,
    threads: u32,
    /// Chunk and stages of the one that copies.
    more: Vec<u64>,
    /// Whether its sum is that of all words.
    sums: bool,
}

/// The kernel that read fastest, and every pass it has made.
pub struct Ceiling {
    reader: Reader,
    /// Median bytes a second of each kernel when the best was chosen.
    pub kernels: Vec<(String, f64)>,
    bytes: usize,
    turn: usize,
    sink: Buffer,
    /// Bytes a second.
    samples: Samples,
}

impl Ceiling {
    /// Tries every kernel over the pool, which has been written.
    pub fn measure(gpu: &Gpu, stream: &Stream, pool: &Buffer, sink: Buffer) -> Outcome<Ceiling> {
        let mut tried: Vec<(Reader, Samples)> = Vec::new();
        let bytes = BYTES.min(pool.bytes() >> 22 << 22);
        let mut seen = None;
        for reader in readers(gpu)? {
            let mut samples = Samples::default();
            for turn in 0..PASSES {
                sink.upload(0, &[0; 4])?;
                samples.push(pass(stream, pool, &sink, &reader, bytes, 0)?);
                let mut sum = [0; 4];
                sink.download(0, &mut sum)?;
                if reader.sums && *seen.get_or_insert(sum) != sum {
                    return Err(format!("{}, pass {turn}: found another sum than before", reader.name).into());
                }
            }
            tried.push((reader, samples));
        }
        let kernels = tried.iter().map(|(reader, samples)| (reader.name.clone(), samples.median())).collect();
        let best = tried.into_iter().max_by(|a, b| a.1.median().total_cmp(&b.1.median()));
        let (reader, samples) = best.ok_or("no read kernel for this GPU")?;
        Ok(Ceiling { reader, kernels, bytes, turn: 0, sink, samples })
    }

    /// One more pass of the best kernel.
    pub fn sample(&mut self, stream: &Stream, pool: &Buffer) -> Outcome<()> {
        // Another part of the pool each time, so that none comes from a cache.
        let parts = pool.bytes() / self.bytes;
        let from = self.turn % parts.max(1) * self.bytes;
        self.turn += 1;
        let found = pass(stream, pool, &self.sink, &self.reader, self.bytes, from)?;
        self.samples.push(found);
        Ok(())
    }

    /// The best kernel.
    pub fn kernel(&self) -> &str {
        &self.reader.name
    }

    /// Bytes of a pass.
    pub fn bytes(&self) -> usize {
        self.bytes
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

/// Reads `bytes` of the pool once; bytes a second.
fn pass(stream: &Stream, pool: &Buffer, sink: &Buffer, reader: &Reader, bytes: usize, from: usize) -> Outcome<f64> {
    let mut arguments = vec![pool.data() as u64 + from as u64, bytes as u64, sink.data() as u64];
    arguments.extend(&reader.more);
    // SAFETY: the arguments of the reader's kernel: a part of the pool, and the sink. `time` waits for it, and both are borrowed
    // meanwhile.
    let seconds = stream.time(|| unsafe { reader.kernel.launch(stream, reader.grid, reader.threads, &arguments) })?;
    Ok(bytes as f64 / seconds)
}

fn readers(gpu: &Gpu) -> Outcome<Vec<Reader>> {
    let units = gpu.card.multiprocessors as u32;
    let mut readers = Vec::new();
    for (symbol, how) in [("bench_read_together", "side by side"), ("bench_read_apart", "apart")] {
        for (threads, blocks) in [(256, 4), (256, 8), (512, 2), (512, 4), (1024, 1), (1024, 2)] {
            readers.push(Reader {
                name: format!("16-byte loads, {how}, {blocks} blocks of {threads}"),
                kernel: gpu.kernel(symbol, 0)?,
                grid: units * blocks,
                threads,
                more: Vec::new(),
                sums: true,
            });
        }
    }
    if gpu.card.compute_capability >= (9, 0) {
        for (kib, stages, blocks) in [(8, 12, 1), (8, 12, 2), (16, 6, 1), (16, 6, 2), (16, 12, 1), (32, 6, 1)] {
            readers.push(Reader {
                name: format!("bulk copies of {kib} KiB, {stages} in flight, {blocks} blocks"),
                kernel: gpu.kernel("bench_read_bulk", (kib * stages) << 10)?,
                grid: units * blocks,
                threads: 32,
                more: vec![u64::from(kib) << 10, u64::from(stages)],
                sums: false,
            });
        }
    }
    Ok(readers)
}
