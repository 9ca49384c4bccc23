//! What two GPUs can do for each other at most: a flag one way, a copy, and an exchange of words that carry their own flags.

use serde::Serialize;
use treeattn::runtime::{Buffer, Device, Runtime};

use super::driver::{Current, Gpu, Stream, let_access};
use crate::bench::samples::Samples;
use crate::outcome::Outcome;

/// Flags to and fro in a measurement.
const TURNS: u64 = 10_000;
/// Bytes of a copy: large enough that its start does not count.
const COPIED: usize = 1 << 30;
/// Exchanges in a graph.
const EXCHANGES: usize = 200;
/// Measurements, of which the median counts.
const TIMES: usize = 7;

/// What was measured between two GPUs.
#[derive(Clone, Debug, Serialize)]
pub struct Peers {
    pub between: [String; 2],
    /// Seconds of a flag one way: half of one to and fro.
    pub flag: f64,
    /// Bytes a second of a copy one way.
    pub copy: f64,
    pub exchanges: Vec<PlainExchange>,
}

/// Words sent to the peer beside their flags, those of the peer added: the least that an exchange does. The kernel that counts
/// the exchange is included.
#[derive(Clone, Debug, Serialize)]
pub struct PlainExchange {
    /// That each GPU sends, flags not counted.
    pub bytes: usize,
    pub seconds: f64,
}

/// One of the GPUs.
struct Side {
    stream: Stream,
    device: Device,
    /// A flag, and what became of the wait for it.
    words: Buffer,
    /// After what needs its context.
    gpu: Gpu,
}

impl Side {
    fn new(runtime: &Runtime, device: Device) -> Outcome<Side> {
        let info = runtime.device_info(device)?;
        let gpu = Gpu::new(device.ordinal, info.name, info.memory)?;
        let words = Buffer::alloc(runtime, device, 8)?;
        words.upload(0, &[0; 8])?;
        Ok(Side { stream: Stream::new()?, device, words, gpu })
    }

    fn current(&self) -> Outcome<Current> {
        Current::new(self.device.ordinal)
    }

    /// Enqueues a kernel on this GPU.
    ///
    /// # Safety
    /// The kernel takes as many arguments, and the memory that they point to outlives it.
    unsafe fn launch(&self, kernel: &str, (grid, threads): (u32, u32), arguments: &[u64]) -> Outcome<()> {
        // SAFETY: `gpu` lives as long as `self`; the arguments are as this function was promised.
        unsafe { self.gpu.kernel(kernel, 0)?.launch(&self.stream, grid, threads, arguments) }
    }

    /// Waits for what is on the stream.
    fn finish(&self) -> Outcome<()> {
        let _current = self.current()?;
        self.stream.time(|| Ok(())).map(drop)
    }

    /// A 32-bit word that kernels left.
    fn word(buffer: &Buffer, index: usize) -> Outcome<u32> {
        let mut word = [0; 4];
        buffer.download(4 * index, &mut word)?;
        Ok(u32::from_ne_bytes(word))
    }
}

/// Measures between two GPUs, with exchanges of `sizes` bytes. An error where one's writes do not reach the other.
pub fn measure(runtime: &Runtime, devices: [Device; 2], sizes: &[usize]) -> Outcome<Peers> {
    let first = Side::new(runtime, devices[0])?;
    let second = Side::new(runtime, devices[1])?;
    let sides = [&first, &second];
    let_access(devices[0].ordinal, devices[1].ordinal)?;
    let_access(devices[1].ordinal, devices[0].ordinal)?;
    let found = Peers {
        between: devices.map(|device| device.to_string()),
        flag: flag(sides)?,
        copy: copy(runtime, sides)?,
        exchanges: sizes
            .iter()
            .map(|&bytes| Ok(PlainExchange { bytes, seconds: exchange(runtime, sides, bytes)? }))
            .collect::<Outcome<_>>()?,
    };
    // In the reverse order of their contexts.
    drop(second);
    drop(first);
    Ok(found)
}

fn unseen(writer: &Side, reader: &Side) -> Box<dyn std::error::Error> {
    format!("{}: found nothing of what {} wrote to it within 1 s", reader.device, writer.device).into()
}

/// Runs the same on both GPUs at once; the first one's time.
fn both(sides: [&Side; 2], enqueue: &dyn Fn(usize) -> Outcome<()>) -> Outcome<f64> {
    {
        let _current = sides[1].current()?;
        enqueue(1)?;
    }
    let seconds = {
        let _current = sides[0].current()?;
        sides[0].stream.time(|| enqueue(0))?
    };
    sides[1].finish()?;
    Ok(seconds)
}

fn flag(sides: [&Side; 2]) -> Outcome<f64> {
    let mut samples = Samples::default();
    for _ in 0..TIMES {
        sides.iter().try_for_each(|side| side.words.upload(0, &[0; 8]))?;
        let enqueue = |mine: usize| {
            let [own, peers] = [mine, 1 - mine].map(|side| sides[side].words.data() as u64);
            let arguments = [own, peers, u64::from(mine == 0), TURNS, own + 4];
            // SAFETY: the five arguments of the kernel. The words of both sides are freed with them, after `both` has waited.
            unsafe { sides[mine].launch("bench_flag", (1, 1), &arguments) }
        };
        let seconds = both(sides, &enqueue)?;
        for (reader, writer) in [(0, 1), (1, 0)] {
            if u64::from(Side::word(&sides[reader].words, 1)?) != TURNS {
                return Err(unseen(sides[writer], sides[reader]));
            }
        }
        samples.push(seconds / (2 * TURNS) as f64);
    }
    Ok(samples.median())
}

fn copy(runtime: &Runtime, sides: [&Side; 2]) -> Outcome<f64> {
    let [from, to] = sides.map(|side| Buffer::alloc(runtime, side.device, COPIED));
    let (from, to) = (from?, to?);
    let _current = sides[0].current()?;
    let mut samples = Samples::default();
    for _ in 0..TIMES {
        // SAFETY: both buffers have as many bytes; they are freed after `time` has waited for the copy.
        let copy = || unsafe { sides[0].stream.copy(to.data() as u64, from.data() as u64, COPIED) };
        let seconds = sides[0].stream.time(copy)?;
        samples.push(COPIED as f64 / seconds);
    }
    Ok(samples.median())
}

fn exchange(runtime: &Runtime, sides: [&Side; 2], bytes: usize) -> Outcome<f64> {
    let words = bytes / 4;
    let zeroed = |side: &Side, bytes: usize| -> Outcome<Buffer> {
        let buffer = Buffer::alloc(runtime, side.device, bytes)?;
        buffer.upload(0, &vec![0; bytes])?;
        Ok(buffer)
    };
    let memory = |side: &Side| -> Outcome<[Buffer; 4]> {
        Ok([zeroed(side, bytes)?, zeroed(side, bytes)?, zeroed(side, 16 * words)?, zeroed(side, 8)?])
    };
    let all = [memory(sides[0])?, memory(sides[1])?];
    let address = |side: usize, index: usize| all[side][index].data() as u64;
    let grid = words.div_ceil(512).min(64) as u32;
    let graph = |mine: usize| {
        let _current = sides[mine].current()?;
        sides[mine].stream.capture(|| {
            for _ in 0..EXCHANGES {
                let state = address(mine, 3);
                let memory = [address(mine, 0), address(mine, 1), address(mine, 2), address(1 - mine, 2)];
                let arguments = [&memory[..], &[words as u64, state]].concat();
                // SAFETY: the arguments of each kernel, in buffers of `all`. Captured work runs by `replay` alone.
                unsafe {
                    sides[mine].launch("bench_words", (grid, 512), &arguments)?;
                    sides[mine].launch("bench_counted", (1, 1), &[state])?;
                }
            }
            Ok(())
        })
    };
    let graphs = [graph(0)?, graph(1)?];
    let mut samples = Samples::default();
    for turn in 0..=TIMES {
        // SAFETY: the graphs use buffers of `all`, which are freed after `both` has waited for the replays.
        let seconds = both(sides, &|mine| unsafe { sides[mine].stream.replay(&graphs[mine]) })?;
        for (reader, writer) in [(0, 1), (1, 0)] {
            if Side::word(&all[reader][3], 1)? != 0 {
                return Err(unseen(sides[writer], sides[reader]));
            }
        }
        // The first replay also brings the graphs to the GPUs.
        if turn > 0 {
            samples.push(seconds / EXCHANGES as f64);
        }
    }
    Ok(samples.median())
}
