//! `treeattn bench`: decode steps and exchanges on CPU ranks, beside what the machine can do at most.
//!
//! `case` says what is timed, `pool` holds the memory, `ceiling` and `limit` measure the machine in the same run,
//! `decode`, `exchange` and `algorithms` time the library (`ranks` releases all ranks at once, by `barrier`), `samples` sums up and
//! `report` tells. Rows, ceiling and limits take turns in short blocks, so that a noise that comes and goes meets all of
//! them alike.

mod algorithms;
mod barrier;
mod case;
mod ceiling;
mod cuda;
mod decode;
mod exchange;
mod limit;
mod pool;
mod ranks;
mod report;
mod samples;

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use treeattn::attention::{Algorithm, Dtype};
use treeattn::cpu::Isa;
use treeattn::device::available_cores;
use treeattn::runtime::{Device, DeviceKind, Runtime, RuntimeConfig};

use self::case::{Axes, Case, Heads, Target};
pub use self::ceiling::Ceiling;
use self::decode::{Decode, least_pool};
use self::limit::Limit;
pub use self::pool::Pool;
use self::report::{CeilingReport, LimitReport, Report, Row};
use self::samples::Samples;
use crate::machine::{Machine, Usage};
use crate::{Outcome, print};

#[derive(clap::Args)]
pub struct Args {
    /// What to time: cpu:0, or a GPU such as cuda:0.
    #[arg(long, default_value = "cpu:0", value_parser = device)]
    device: Device,
    /// A few seconds, with short caches: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Heads and dimensions to time, such as 32/8x128,16/16x128. Any of these axes replaces the standard rows.
    #[arg(long, value_delimiter = ',')]
    heads: Vec<Heads>,
    /// Element types: f16, bf16, f32.
    #[arg(long, value_delimiter = ',', value_parser = dtype)]
    dtype: Vec<Dtype>,
    /// Keys of each sequence, all ranks together.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    lengths: Vec<usize>,
    /// Sequences.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    batch: Vec<usize>,
    /// Ranks that the keys are sharded over; exchanges are timed for those above 1. Or the GPU of each rank, such as
    /// cuda:0,cuda:1: then times steps and exchanges between them.
    #[arg(long, value_delimiter = ',', value_parser = ranks)]
    ranks: Vec<Ranks>,
    /// Kernels: scalar, avx2, avx512, neon.
    #[arg(long, value_delimiter = ',', value_parser = isa)]
    isa: Vec<Isa>,
    /// Tokens a page of a block table; 0: a strided cache.
    #[arg(long, value_delimiter = ',', value_parser = page)]
    page_size: Vec<usize>,
    /// Query tokens of each sequence, on a GPU.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    query_tokens: Vec<usize>,
    /// Threads of each rank. Default: the cores over the ranks.
    #[arg(long, value_parser = size)]
    threads: Option<usize>,
    /// Memory to read from, MiB; grows to twice the largest cache.
    #[arg(long, value_parser = size)]
    pool_mib: Option<usize>,
    /// Leaves the exchanges out, and the comparison of algorithms.
    #[arg(long)]
    no_exchange: bool,
    /// Compares exchange algorithms over the lengths and ranks given, and times nothing else: one_shot, two_shot, tree,
    /// allreduce3, ring, or all. The standard run compares all.
    #[arg(long, value_delimiter = ',', value_parser = algorithm)]
    algorithms: Vec<Algorithms>,
    /// Writes everything found to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws the comparison of algorithms, or what was found on a GPU, to this SVG file.
    #[arg(long)]
    plot: Option<PathBuf>,
}

fn device(text: &str) -> Result<Device, String> {
    let parse = || {
        let (kind, ordinal) = text.split_once(':')?;
        let kind = match kind {
            "cpu" => DeviceKind::Cpu,
            "cuda" => DeviceKind::Cuda,
            _ => return None,
        };
        Some(Device { kind, ordinal: ordinal.parse().ok().filter(|&ordinal| ordinal >= 0)? })
    };
    parse()
        .filter(|device| *device == Device::CPU || device.kind == DeviceKind::Cuda)
        .ok_or("wanted cpu:0 or cuda:N".into())
}

/// The element types that are timed.
const DTYPES: [Dtype; 3] = [Dtype::F16, Dtype::Bf16, Dtype::F32];

fn dtype(name: &str) -> Result<Dtype, String> {
    let found = DTYPES.into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| "wanted f16, bf16 or f32".to_string())
}

/// Some of the exchange algorithms.
#[derive(Clone, Debug)]
struct Algorithms(Vec<Algorithm>);

fn algorithm(name: &str) -> Result<Algorithms, String> {
    let chosen = |algorithm: &&Algorithm| name == "all" || algorithm.name().eq_ignore_ascii_case(name);
    let found: Vec<Algorithm> = algorithms::ALL.iter().filter(chosen).copied().collect();
    if found.is_empty() {
        Err("wanted one_shot, two_shot, tree, allreduce3, ring or all".into())
    } else {
        Ok(Algorithms(found))
    }
}

fn isa(name: &str) -> Result<Isa, String> {
    Isa::by_name("--isa", name).map_err(|error| error.message().to_string())
}

fn size(text: &str) -> Result<usize, String> {
    let fits = |&n: &usize| n >= 1 && n <= i32::MAX as usize;
    text.parse().ok().filter(fits).ok_or_else(|| format!("wanted a whole number from 1 to {}", i32::MAX))
}

/// A number of CPU ranks, or the GPU of one rank.
#[derive(Clone, Copy, Debug)]
enum Ranks {
    Count(usize),
    On(Device),
}

fn ranks(text: &str) -> Result<Ranks, String> {
    if text.contains(':') {
        let on = device(text).ok().filter(|device| device.kind == DeviceKind::Cuda);
        return on.map(Ranks::On).ok_or_else(|| "wanted cuda:N".into());
    }
    size(text).map(Ranks::Count)
}

fn page(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

/// How long everything is measured.
struct Pace {
    /// Turns of all rows, ceiling and limits.
    rounds: usize,
    /// Seconds of a row in a round.
    block: f64,
    exchanges: usize,
    pool_mib: usize,
}

const FULL: Pace = Pace { rounds: 12, block: 0.08, exchanges: 10_000, pool_mib: 1024 };
const QUICK: Pace = Pace { rounds: 2, block: 0.02, exchanges: 500, pool_mib: 256 };

pub fn run(args: &Args) -> Outcome<()> {
    let devices: Vec<Device> =
        args.ranks.iter().filter_map(|rank| if let Ranks::On(device) = rank { Some(*device) } else { None }).collect();
    let counts: Vec<usize> =
        args.ranks.iter().filter_map(|rank| if let Ranks::Count(n) = rank { Some(*n) } else { None }).collect();
    if !devices.is_empty() {
        return match counts.first() {
            Some(count) => Err(format!("--ranks: found {count} among GPUs, wanted the GPU of each rank").into()),
            None => cuda::run_ranks(args, &devices),
        };
    }
    if args.device.kind == DeviceKind::Cuda {
        return cuda::run(args, args.device);
    }
    if !args.query_tokens.is_empty() {
        return Err("--query-tokens: it is for a GPU, wanted --device cuda:N".into());
    }
    let pace = if args.quick { QUICK } else { FULL };
    let cores = available_cores();
    let axes = Axes {
        heads: args.heads.clone(),
        dtypes: args.dtype.clone(),
        lengths: args.lengths.clone(),
        batches: args.batch.clone(),
        ranks: counts.clone(),
        isas: args.isa.clone(),
        pages: args.page_size.clone(),
        threads: args.threads,
    };
    let asked: Vec<Algorithm> = args.algorithms.iter().flat_map(|some| &some.0).copied().collect();
    let standard = axes.is_empty() && asked.is_empty();
    let cases = match (standard, asked.is_empty()) {
        (true, _) => case::standard(cores, args.quick),
        (false, true) => axes.cases(cores),
        (false, false) => Vec::new(),
    };
    let compared = if standard && !args.no_exchange { algorithms::ALL.to_vec() } else { asked };
    let contests = if compared.is_empty() { Vec::new() } else { algorithms::cases(&axes, cores, args.quick) };
    if args.plot.is_some() && contests.is_empty() {
        return Err("--plot: there is nothing to draw without --algorithms over more than one rank".into());
    }
    let targets: Vec<Target> = if standard && !args.quick { case::targets(cores) } else { Vec::new() };
    let largest = cases.iter().chain(&contests).map(least_pool).max().unwrap_or(0);
    let pool_mib = args.pool_mib.unwrap_or(pace.pool_mib);
    let pool_bytes = pool_mib.saturating_mul(1 << 20).max(largest.saturating_mul(2));
    let machine = Machine::find(&Runtime::new(RuntimeConfig::default())?)?;
    if pool_bytes as u64 > machine.memory_bytes / 4 * 3 {
        let has = machine.memory_bytes >> 20;
        return Err(format!("memory to read from: {} MiB wanted, this machine has {has} MiB", pool_bytes >> 20).into());
    }

    let exchanges = match (args.no_exchange, &counts[..]) {
        _ if !args.algorithms.is_empty() => Vec::new(),
        (true, _) => Vec::new(),
        (false, []) => vec![2, 4],
        (false, ranks) => ranks.iter().copied().filter(|&ranks| ranks > 1).collect(),
    };
    let turns = pace.rounds.div_ceil(2);
    let progress = progress(pace.rounds * cases.len() + exchanges.len() + turns * contests.len() * compared.len());
    progress.set_message("read bandwidth");
    let before = Usage::now();
    let pool = Pool::new(pool_bytes)?;
    let mut ceiling = Ceiling::measure(&pool)?;
    let mut limits = Limit::all();
    let mut rows = decode_rows(&cases, &pool, &mut ceiling, &mut limits, &pace, &progress)?;
    rows.sort_by_key(|row| row.place);

    let mut found = Vec::new();
    for ranks in exchanges {
        progress.set_message(format!("exchange, {ranks} ranks"));
        found.push(exchange::time(ranks, pace.exchanges)?);
        progress.inc(1);
    }
    let mut comparisons = Vec::new();
    for dtype in DTYPES {
        let mine: Vec<Case> = contests.iter().filter(|case| case.dtype == dtype).copied().collect();
        if !mine.is_empty() {
            pool.fill(dtype)?;
            let told = |what: String| {
                progress.set_message(what);
                progress.inc(1);
            };
            comparisons.extend(algorithms::compare(&compared, &mine, &pool, (turns, pace.block), &told)?);
        }
    }
    progress.finish_and_clear();

    let peak = ceiling.peak();
    let fma = |isa| limits.iter().find(|limit| limit.is_fma_of(isa)).map(Limit::median);
    let row = |timed: Timed| {
        let beside = timed.beside.map(|beside| (beside.ceiling.median(), beside.over.median()));
        Row::new(timed.case, timed.seconds, beside, peak, fma(timed.case.isa))
    };
    let rows: Vec<Row> = rows.into_iter().map(row).collect();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        machine,
        pool_bytes: pool.bytes(),
        ceiling: CeilingReport {
            kernel: ceiling.kernel(),
            median: ceiling.median(),
            peak: ceiling.peak(),
            kernels: ceiling.kernels.clone(),
        },
        limits: limits
            .iter()
            .filter(|_| !rows.is_empty())
            .map(|limit| LimitReport { name: limit.name(), median: limit.median(), peak: limit.peak() })
            .collect(),
        contaminated: rows.iter().any(|row| row.contaminated),
        rows,
        exchanges: found,
        ring_over_one_shot: algorithms::ring_over_one_shot(&comparisons),
        algorithms: comparisons,
        targets: Vec::new(),
        others_share: before.zip(Usage::now()).and_then(|(before, after)| before.others(&after)),
    };
    report.targets = report.judge(&targets);
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).map_err(|error| format!("--json {}: {error}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        let svg = algorithms::plot(&report.algorithms, &report.machine.processor).svg();
        std::fs::write(path, svg).map_err(|error| format!("--plot {}: {error}", path.display()))?;
    }
    print(&report.text())
}

/// What the blocks of one case gave.
struct Timed {
    /// Its place among the cases.
    place: usize,
    case: Case,
    seconds: samples::Summary,
    /// Where the case reads from memory.
    beside: Option<Beside>,
}

/// The read bandwidth just before each block of a case, bytes a second, and the block's time over bytes / bandwidth.
#[derive(Clone, Debug, Default)]
struct Beside {
    ceiling: Samples,
    over: Samples,
}

/// Times all cases, those of one element type together, since the pool holds one at a time.
fn decode_rows(
    cases: &[Case],
    pool: &Pool,
    ceiling: &mut Ceiling,
    limits: &mut [Limit],
    pace: &Pace,
    progress: &ProgressBar,
) -> Outcome<Vec<Timed>> {
    let mut rows = Vec::new();
    for dtype in DTYPES {
        let mine: Vec<usize> = (0..cases.len()).filter(|&place| cases[place].dtype == dtype).collect();
        if mine.is_empty() {
            continue;
        }
        progress.set_message(format!("writing {} MiB of {}", pool.bytes() >> 20, dtype.name()));
        pool.fill(dtype)?;
        let mut decodes =
            mine.iter().map(|&place| Decode::new(cases[place], Algorithm::Auto, pool)).collect::<Outcome<Vec<_>>>()?;
        let mut beside = vec![Beside::default(); decodes.len()];
        for _ in 0..pace.rounds {
            for limit in limits.iter_mut() {
                limit.sample(&pool.workers)?;
            }
            for (decode, beside) in decodes.iter_mut().zip(&mut beside) {
                progress.set_message(format!("{} {}", decode.case.shape(), dtype.name()));
                if decode.case.cached {
                    decode.block(pace.block)?;
                } else {
                    let read = ceiling.sample(pool)?;
                    beside.ceiling.push(read);
                    beside.over.push(decode.block(pace.block)? * read / decode.case.kv_bytes() as f64);
                }
                progress.inc(1);
            }
        }
        rows.extend(mine.into_iter().zip(decodes.iter().zip(beside)).map(|(place, (decode, beside))| Timed {
            place,
            case: decode.case,
            seconds: decode.times.summary(),
            beside: (!decode.case.cached).then_some(beside),
        }));
    }
    Ok(rows)
}

/// A bar on standard error, where that is a terminal.
fn progress(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {bar:30} {percent}% {msg}") {
        bar.set_style(style);
    }
    bar
}
