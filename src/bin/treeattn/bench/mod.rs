//! `treeattn bench`: decode steps and exchanges on CPU ranks, beside what the machine can do at most.
//!
//! `args` says what was asked, `case` what is timed, `pool` holds the memory, `ceiling` and `limit` measure the machine in the same run,
//! `decode` (with `terms`), `exchange` and `algorithms` time the library (`ranks` releases all ranks at once, by `barrier`), `samples` sums up and
//! `report` tells. Rows, ceiling and limits take turns in short blocks, so that a noise that comes and goes meets all of
//! them alike.

mod algorithms;
mod args;
mod barrier;
mod case;
mod ceiling;
mod cuda;
mod decode;
mod exchange;
mod limit;
mod pool;
mod progress;
mod ranks;
mod report;
mod samples;
mod terms;

use indicatif::ProgressBar;
use treeattn::attention::{Algorithm, Dtype};
use treeattn::device::available_cores;
use treeattn::runtime::{Device, DeviceKind, Runtime, RuntimeConfig};

use self::algorithms::Comparison;
use self::args::Ranks;
pub use self::args::{Args, device};
use self::case::{Axes, Case, Target};
pub use self::case::{Heads, refuse_latent};
pub use self::ceiling::Ceiling;
pub use self::cuda::measure_peers;
use self::decode::{Decode, least_pool};
use self::limit::Limit;
pub use self::pool::Pool;
use self::report::{CeilingReport, Report, Row};
use self::samples::Samples;
use crate::machine::{Machine, Usage};
use crate::outcome::{Outcome, print};

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
    if !devices.is_empty() && !args.terms.is_empty() {
        return Err("--terms: found some for several GPUs, wanted none: they are for CPUs and --device cuda:N".into());
    }
    if !devices.is_empty() {
        return match counts.first() {
            Some(count) => Err(format!("--ranks: found {count} among GPUs, wanted the GPU of each rank").into()),
            None => cuda::run_ranks(args, &devices),
        };
    }
    if args.device.kind == DeviceKind::Cuda {
        return match args.checked && counts.is_empty() {
            true => cuda::run_ranks(args, &[args.device; 2]),
            false => cuda::run(args, args.device),
        };
    }
    if args.checked && !counts.is_empty() && counts.iter().all(|&ranks| ranks == 1) {
        return Err("--checked: found one rank, wanted ranks that compare something, as in --ranks 2".into());
    }
    refuse_latent(&args.heads)?;
    let pace = if args.quick { QUICK } else { FULL };
    let cores = available_cores();
    let axes = Axes {
        heads: args.heads.clone(),
        dtypes: args.dtype.clone(),
        kv_dtypes: args.kv_dtype.clone(),
        lengths: args.lengths.clone(),
        batches: args.batch.clone(),
        ranks: counts.clone(),
        isas: args.isa.clone(),
        pages: args.page_size.clone(),
        query_tokens: args.query_tokens.clone(),
        head_major: args.head_major,
        checked: args.checked,
        terms: args.terms.clone(),
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
    if let Some(case) = cases.iter().chain(&contests).find(|case| case.query_tokens > case.keys) {
        let (found, keys) = (case.query_tokens, case.keys);
        return Err(format!("--query-tokens: found {found}, wanted at most the {keys} keys of a sequence").into());
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
    let progress = progress::bar(pace.rounds * cases.len() + exchanges.len() + turns * contests.len() * compared.len());
    progress.set_message("read bandwidth");
    let before = Usage::now();
    let pool = Pool::new(pool_bytes)?;
    let mut ceiling = Ceiling::measure(&pool)?;
    let mut limits = Limit::all();
    let mut rows = decode_rows(&cases, &pool, &mut ceiling, &mut limits, &pace, &progress)?;
    rows.sort_by_key(|row| row.index);

    let mut found = Vec::new();
    for ranks in exchanges {
        progress.set_message(format!("exchange, {ranks} ranks"));
        found.push(exchange::time(ranks, pace.exchanges)?);
        progress.inc(1);
    }
    let mut comparisons = Vec::new();
    for dtype in Dtype::ALL {
        let mine: Vec<Case> = contests.iter().filter(|case| case.kv_format().dtype() == dtype).copied().collect();
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
    let row = |timed: Timed| {
        let beside = timed.beside.map(|beside| (beside.ceiling.median(), beside.over.median()));
        Row { added_by_checks: timed.added_by_checks, ..Row::new(timed.case, timed.seconds, beside, peak) }
    };
    let mut rows: Vec<Row> = rows.into_iter().map(row).collect();
    let limits = report::limits(&limits, &mut rows);
    let from_memory = rows.iter().filter(|row| !row.case.cached && !row.contaminated).map(|row| row.bytes_per_second);
    let rates = from_memory.chain(comparisons.iter().map(Comparison::bytes_per_second));
    // What a step reached is possible: no limit is below it.
    let bandwidth = rates.fold(ceiling.median(), f64::max);
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        machine,
        pool_bytes: pool.bytes(),
        ceiling: CeilingReport {
            kernel: ceiling.kernel(),
            median: ceiling.median(),
            peak: ceiling.peak(),
            limit: bandwidth,
            kernels: ceiling.kernels.clone(),
        },
        limits,
        contaminated: rows.iter().any(|row| row.contaminated),
        rows,
        exchanges: found,
        ring_over_one_shot: algorithms::ring_over_one_shot(&comparisons),
        algorithms: comparisons,
        targets: Vec::new(),
        others_share: before.zip(Usage::now()).and_then(|(before, after)| before.others(&after)),
    };
    report.targets = report.judge(&targets);
    args.write(&report, || {
        algorithms::plot(&report.algorithms, report.ceiling.limit, &report.machine, &report.command)
    })?;
    print(&report.text())
}

/// What the blocks of one case gave.
struct Timed {
    /// Of the case.
    index: usize,
    case: Case,
    seconds: samples::Summary,
    /// Where the case reads from memory.
    beside: Option<Beside>,
    /// Of a checked case, its blocks' seconds a step less those of the blocks beside them that are not checked.
    added_by_checks: Option<samples::Summary>,
}

/// The read bandwidth beside each block of a case, bytes a second, and the block's time over bytes / bandwidth. The
/// bandwidth is what was read fastest then: by the read kernel just before, or by the block itself.
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
    for dtype in Dtype::ALL {
        let mine: Vec<usize> = (0..cases.len()).filter(|&index| cases[index].kv_format().dtype() == dtype).collect();
        if mine.is_empty() {
            continue;
        }
        progress.set_message(format!("writing {} MiB of {}", pool.bytes() >> 20, dtype.name()));
        pool.fill(dtype)?;
        let mut decodes =
            mine.iter().map(|&index| Decode::new(cases[index], Algorithm::Auto, pool)).collect::<Outcome<Vec<_>>>()?;
        let mut beside = vec![Beside::default(); decodes.len()];
        let mut added = vec![Samples::default(); decodes.len()];
        for _ in 0..pace.rounds {
            let mut blocks: Vec<(Case, f64)> = Vec::new();
            for limit in limits.iter_mut() {
                limit.sample(&pool.workers)?;
            }
            for ((decode, beside), added) in decodes.iter_mut().zip(&mut beside).zip(&mut added) {
                progress.set_message(format!("{} {}", decode.case.shape(), dtype.name()));
                let read = if decode.case.cached { None } else { Some(ceiling.sample(pool)?) };
                let block = decode.block(pace.block)?;
                if let Some(read) = read {
                    let own = decode.case.kv_bytes() as f64 / block;
                    beside.ceiling.push(read.max(own));
                    beside.over.push(read.max(own) / own);
                }
                // The unchecked twin has just had its turn.
                let twin = Case { checked: false, ..decode.case };
                if let Some((_, plain)) = blocks.iter().find(|(case, _)| decode.case.checked && *case == twin) {
                    added.push(block - plain);
                }
                blocks.push((decode.case, block));
                progress.inc(1);
            }
        }
        let found = decodes.iter().zip(beside).zip(added);
        rows.extend(mine.into_iter().zip(found).map(|(index, ((decode, beside), added))| Timed {
            index,
            case: decode.case,
            seconds: decode.times.summary(),
            beside: (!decode.case.cached).then_some(beside),
            added_by_checks: decode.case.checked.then(|| added.summary()),
        }));
    }
    Ok(rows)
}
