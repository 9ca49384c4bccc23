//! `treeattn bench --ranks cuda:0,cuda:1`: decode steps whose cache is sharded over GPUs, and exchanges alone, the
//! library's own beside the paper's three allreduces in one run, and beside what the machine can do at most; with `--checked`
//! the first of them once more with ranks that compare what they were passed.
//!
//! Every rank has a thread, a stream and a pool of random numbers. A step's time is that of the slowest rank. `meeting`
//! keeps the threads together, `time` measures, `report` tells.

mod meeting;
mod report;
mod time;

use treeattn::attention::{Algorithm, DecodeArgs, Dtype, OutputMode};
use treeattn::runtime::{Buffer, CommConfig, Communicator, Device, Plan, Runtime, RuntimeConfig};

use self::report::{ExchangeRow, Found, Report, Row};
use self::time::{Rank, Work, merge_desc};
use super::case::{self, Axes, Case};
use super::ceiling::Ceiling;
use super::decode::{FULL, Memory, QUICK, describe, least_pool};
use super::driver::{Gpu, Stream};
use super::peers;
use super::pool::{QUICK_POOL, fill};
use crate::bench::args::Args;
use crate::bench::progress;
use crate::outcome::{Outcome, print};

/// Bytes of memory to read from on each rank, unless a case needs more.
const POOL: usize = 4 << 30;
/// Query tokens of the partials whose exchange is timed: with 32 heads x 128 in f32 16 KB, 132 KB and 1.02 MB.
const EXCHANGED: [usize; 3] = [1, 8, 62];

pub fn run(args: &Args, devices: &[Device]) -> Outcome<()> {
    refuse(args)?;
    let axes = Axes {
        heads: args.heads.clone(),
        dtypes: args.dtype.clone(),
        batches: args.batch.clone(),
        lengths: args.lengths.clone(),
        pages: args.page_size.clone(),
        query_tokens: Vec::new(),
        kv_dtypes: Vec::new(),
        terms: Vec::new(),
    };
    let standard = axes.cases().is_empty() && args.algorithms.is_empty();
    let cases = if axes.cases().is_empty() { case::sharded(args.quick) } else { axes.cases() };
    let asked: Vec<Algorithm> = args.algorithms.iter().flat_map(|some| &some.0).copied().collect();
    let algorithms = if asked.is_empty() { vec![Algorithm::Auto, Algorithm::Allreduce3] } else { asked };

    let runtime = Runtime::new(RuntimeConfig::default())?;
    let share = |case: &Case| Case { keys: case.keys.div_ceil(devices.len()), ..*case };
    let least = cases.iter().map(|case| least_pool(&share(case))).max().unwrap_or(0);
    let pool_bytes = match args.pool_mib {
        Some(mib) => mib.saturating_mul(1 << 20),
        None if args.quick => QUICK_POOL,
        None => POOL,
    };
    let pool_bytes = pool_bytes.max(least).next_multiple_of(4 << 20);
    let comms = Communicator::create_local(&runtime, devices, &CommConfig::default())?;
    let comms: Vec<&Communicator> = comms.iter().collect();
    let mut names = Vec::new();
    let mut ranks = Vec::new();
    for &device in devices {
        let info = runtime.device_info(device)?;
        names.push(format!("{device} {}", info.name));
        ranks.push(Rank::new(&runtime, device, info, Buffer::alloc(&runtime, device, pool_bytes)?));
    }
    let pace = if args.quick { QUICK } else { FULL };
    let exchanged = if args.no_exchange { &[][..] } else { &EXCHANGED[..] };
    let progress = progress::bar(cases.len() + exchanged.len());

    let sizes: Vec<usize> = exchanged.iter().map(|&tokens| time::partial_bytes(tokens)).collect();
    progress.set_message("limits");
    let peers = match devices.iter().find(|&&device| device != devices[0]) {
        Some(&other) => Some(peers::measure(&runtime, [devices[0], other], &sizes)?),
        None => None,
    };
    fill_all(&ranks, Dtype::Bf16)?;
    let read_bandwidth = read_bandwidth(&runtime, &ranks[0])?;

    let mut rows = Vec::new();
    let mut filled = Some(Dtype::Bf16);
    for &case in &cases {
        progress.set_message(case.shape());
        if filled.replace(case.dtype) != Some(case.dtype) {
            fill_all(&ranks, case.dtype)?;
        }
        let mine = share(&case);
        let memories = ranks
            .iter()
            .map(|rank| Memory::new(&mine, &runtime, rank.device, &rank.pool))
            .collect::<Outcome<Vec<_>>>()?;
        let sharded = ranks
            .iter()
            .zip(&memories)
            .enumerate()
            .map(|(rank, (on, memory))| Sharded::new(&runtime, on.device, &mine, (rank, devices.len()), &memory.args))
            .collect::<Outcome<Vec<_>>>()?;
        let time = |output: OutputMode, algorithm: Algorithm, checked: bool| -> Outcome<Found> {
            let mut desc = describe(&mine)?;
            (desc.output, desc.algorithm, desc.checked) = (output, algorithm, checked);
            let asked = if checked { report::CHECKED } else { algorithm.name() };
            let plans = match Plan::create_all(&comms, &desc) {
                Ok(plans) => plans,
                Err(error) => return Ok(Found::refused(asked, algorithm, &error)),
            };
            let works: Vec<Work> =
                plans.iter().zip(&sharded).map(|(plan, sharded)| Work::Decode { plan, args: &sharded.args }).collect();
            // SAFETY: pools and memories outlive `time`; freeing device memory waits for the device.
            let timed = unsafe { time::run(&ranks, &works, &pace) }?;
            let found = Found::of(asked, &plans[0].stats()?, timed);
            for memory in &memories {
                memory.check()?;
            }
            Ok(found)
        };
        let local = time(OutputMode::Local, Algorithm::Auto, false)?;
        let mut found = algorithms
            .iter()
            .map(|&algorithm| time(OutputMode::Replicated, algorithm, false))
            .collect::<Outcome<Vec<_>>>()?;
        if args.checked {
            found.push(time(OutputMode::Replicated, algorithms[0], true)?);
        }
        let hop = peers.as_ref().map_or(0.0, |peers| peers.flag);
        rows.push(Row::new(case, devices.len(), local, found, (read_bandwidth, hop))?);
        progress.inc(1);
    }

    let mut exchanges = Vec::new();
    for &tokens in exchanged {
        let desc = merge_desc(tokens)?;
        progress.set_message(format!("exchange of {} bytes", time::partial_bytes(tokens)));
        let partials =
            ranks.iter().map(|rank| time::Partial::new(&runtime, rank, tokens)).collect::<Outcome<Vec<_>>>()?;
        let mut found = Vec::new();
        for &algorithm in &algorithms {
            let plans = match Plan::create_all(&comms, &treeattn::attention::AttentionDesc { algorithm, ..desc }) {
                Ok(plans) => plans,
                Err(error) => {
                    found.push(Found::refused(algorithm.name(), algorithm, &error));
                    continue;
                }
            };
            let works: Vec<Work> =
                plans.iter().zip(&partials).map(|(plan, partial)| Work::Merge { plan, args: &partial.args }).collect();
            // SAFETY: `partials` own the memory, and outlive the plans; freeing device memory waits for the device.
            let timed = unsafe { time::run(&ranks, &works, &pace) }?;
            found.push(Found::of(algorithm.name(), &plans[0].stats()?, timed));
        }
        exchanges.push(ExchangeRow { bytes: time::partial_bytes(tokens), found });
        progress.inc(1);
    }
    progress.finish_and_clear();
    for comm in &comms {
        if let Some(error) = comm.status()?.error {
            return Err(format!("rank {}: {error}", comm.rank()).into());
        }
    }

    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        ranks: names,
        links: serde_json::from_str(&comms[0].describe()?)?,
        pool_bytes,
        read_bandwidth,
        peers,
        rows,
        exchanges,
        targets: Vec::new(),
    };
    if standard && devices.len() == 2 && devices[0] != devices[1] {
        report.targets = report.judge();
    }
    args.write(&report, || report.plot())?;
    print(&report.text())
}

/// A rank's arguments with the positions of its keys among those of all ranks, which checked plans compare.
struct Sharded {
    args: Vec<DecodeArgs>,
    /// Held for the steps.
    _positions: [Buffer; 2],
}

impl Sharded {
    fn new(
        runtime: &Runtime,
        device: Device,
        case: &Case,
        (rank, world): (usize, usize),
        args: &[DecodeArgs],
    ) -> Outcome<Sharded> {
        let same = |value: usize| -> Outcome<Buffer> {
            let buffer = Buffer::alloc(runtime, device, 4 * case.batch)?;
            buffer.upload(0, &i32::try_from(value)?.to_ne_bytes().repeat(case.batch))?;
            Ok(buffer)
        };
        let positions = [same(case.keys * world)?, same(case.keys * rank)?];
        let [global_length, kv_start] = positions.each_ref().map(|buffer| buffer.data() as *const i32);
        let args = args.iter().map(|args| DecodeArgs { global_length, kv_start, ..*args }).collect();
        Ok(Sharded { args, _positions: positions })
    }
}

/// An error for words that say nothing here.
fn refuse(args: &Args) -> Outcome<()> {
    let given = [
        ("--isa", args.isa.is_empty()),
        ("--threads", args.threads.is_none()),
        ("--query-tokens", args.query_tokens.is_empty()),
        ("--kv-dtype", args.kv_dtype.is_empty()),
    ];
    match given.iter().find(|(_, absent)| !absent) {
        Some((word, _)) => Err(format!("{word}: it is not for ranks on GPUs").into()),
        None if args.dtype.contains(&Dtype::F32) => Err("--dtype: found f32, wanted f16 or bf16 on a GPU".into()),
        None => Ok(()),
    }
}

/// Bytes a second at which the first rank's GPU can read its memory.
fn read_bandwidth(runtime: &Runtime, rank: &Rank) -> Outcome<f64> {
    let gpu = Gpu::new(rank.device.ordinal, rank.info.name.clone(), rank.info.memory)?;
    let sink = Buffer::alloc(runtime, rank.device, 4)?;
    Ok(Ceiling::measure(&gpu, &Stream::new()?, &rank.pool, sink)?.median())
}

/// Writes random numbers to every rank's pool.
fn fill_all(ranks: &[Rank], dtype: Dtype) -> Outcome<()> {
    for rank in ranks {
        let gpu = Gpu::new(rank.device.ordinal, rank.info.name.clone(), rank.info.memory)?;
        fill(&gpu, &Stream::new()?, &rank.pool, dtype)?;
    }
    Ok(())
}
