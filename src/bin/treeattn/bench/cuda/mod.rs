//! `treeattn bench --device cuda:N`: decode steps on a GPU, beside the bandwidth at which kernels that do nothing else can
//! read its memory.
//!
//! `case` says what is timed, `driver` is the CUDA that the library has no call for, `pool` the memory to read from, `ceiling` measures the memory,
//! `decode` times the library, `report` tells; `ranks` does all this for several GPUs, beside what `peers` measures between two.

mod case;
mod ceiling;
mod decode;
mod driver;
mod peers;
mod pool;
mod ranks;
mod report;

use treeattn::attention::Dtype;
use treeattn::runtime::{Buffer, Device, Runtime, RuntimeConfig};

use self::case::{Axes, Case};
use self::ceiling::Ceiling;
use self::decode::{FULL, QUICK, least_pool};
use self::driver::{Gpu, Stream};
use self::pool::{POOL, QUICK_POOL, fill, fill_rows};
use self::report::{CeilingReport, Report, Row};
use super::args::Args;
use super::progress;
use crate::outcome::{Outcome, print};

/// The ceiling is measured again before every so many cases.
const BETWEEN: usize = 4;

pub use self::peers::measure as measure_peers;
pub use self::ranks::run as run_ranks;

pub fn run(args: &Args, device: Device) -> Outcome<()> {
    refuse(args)?;
    let axes = Axes {
        heads: args.heads.clone(),
        dtypes: args.dtype.clone(),
        batches: args.batch.clone(),
        lengths: args.lengths.clone(),
        pages: args.page_size.clone(),
        query_tokens: args.query_tokens.clone(),
        kv_dtypes: args.kv_dtype.clone(),
        terms: args.terms.clone(),
    };
    let standard = axes.cases().is_empty();
    let cases = if standard { case::standard(args.quick) } else { axes.cases() };
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let info = runtime.device_info(device)?;
    let gpu = Gpu::new(device.ordinal, info.name, info.memory)?;
    let stream = Stream::new()?;

    let pool_bytes = match args.pool_mib {
        Some(mib) => mib.saturating_mul(1 << 20),
        None if args.quick => QUICK_POOL,
        None => POOL,
    };
    let largest = cases.iter().map(least_pool).max().unwrap_or(0);
    let pool =
        Buffer::alloc(&runtime, device, pool_bytes.max(largest).checked_next_multiple_of(4 << 20).unwrap_or(largest))?;
    let progress = progress::bar(cases.len());
    progress.set_message("read bandwidth");
    fill(&gpu, &stream, &pool, Dtype::Bf16)?;
    let mut ceiling = Ceiling::measure(&gpu, &stream, &pool, Buffer::alloc(&runtime, device, 4)?)?;

    let pace = if args.quick { QUICK } else { FULL };
    let mut timed = Vec::new();
    let mut stored = vec![Dtype::Bf16];
    for case in &cases {
        if !stored.contains(&case.kv_dtype) {
            stored.push(case.kv_dtype);
        }
    }
    for dtype in stored {
        let mine: Vec<usize> = (0..cases.len()).filter(|&index| cases[index].kv_dtype == dtype).collect();
        match dtype {
            Dtype::Bf16 => {}
            Dtype::F16 => fill(&gpu, &stream, &pool, dtype)?,
            _ => fill_rows(&pool, dtype)?,
        }
        for (n, index) in mine.into_iter().enumerate() {
            let case: Case = cases[index];
            progress.set_message(case.shape());
            if n % BETWEEN == 0 {
                ceiling.sample(&stream, &pool)?;
            }
            timed.push((index, decode::time(&case, &runtime, device, &stream, &pool, &pace)?));
            progress.inc(1);
        }
    }
    ceiling.sample(&stream, &pool)?;
    progress.finish_and_clear();
    timed.sort_by_key(|timed| timed.0);

    let rows = timed.into_iter().map(|(index, timed)| Row::new(cases[index], timed));
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        gpu: gpu.card.clone(),
        pool_bytes: pool.bytes(),
        ceiling: CeilingReport {
            kernel: ceiling.kernel().to_string(),
            bytes: ceiling.bytes(),
            median: ceiling.median(),
            peak: ceiling.peak(),
            limit: ceiling.median(),
            kernels: ceiling.kernels.clone(),
        },
        rows: rows.collect(),
        targets: Vec::new(),
        contaminated: false,
    };
    report.set_shares();
    report.contaminated = report.rows.iter().any(|row| report.too_fast(row));
    if standard {
        report.targets = report.judge(&case::targets());
    }
    args.write(&report, || report.plot())?;
    print(&report.text())
}

/// An error for words that say nothing on a GPU.
fn refuse(args: &Args) -> Outcome<()> {
    let given = [
        ("--ranks", args.ranks.is_empty()),
        ("--isa", args.isa.is_empty()),
        ("--threads", args.threads.is_none()),
        ("--algorithms", args.algorithms.is_empty()),
    ];
    if let Some((word, _)) = given.iter().find(|(_, absent)| !absent) {
        return Err(format!("{word}: it is for the CPU, found --device {}", args.device).into());
    }
    if args.dtype.contains(&Dtype::F32) {
        return Err("--dtype: found f32, wanted f16 or bf16 on a GPU".into());
    }
    Ok(())
}
