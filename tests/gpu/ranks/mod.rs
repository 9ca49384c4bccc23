//! Ranks on GPUs that exchange through each other's memory: several on one GPU, and over two where there are two.

pub mod accounts;
pub mod checks;
pub mod conventions;
mod desync;
pub mod faults;
pub mod merges;
pub mod order;
pub mod queries;
pub mod weighted;

use std::collections::HashMap;
use std::time::Duration;

use treeattn::attention::reference::Comparison;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode, QueryInput};
use treeattn::runtime::{DeviceKind, Plan, Runtime, RuntimeConfig};

use crate::group::{Group, ranks};
use crate::numerics::{MEAN_ERROR, shape};
use crate::space::{self, Shapes};
use crate::support::case::Case;
use crate::support::rng::Rng;
use crate::support::run::{MeanError, judge, judge_on};
use crate::support::values::Values;
use crate::support::{only_case, seed};

/// A time limit far above what any step here takes.
const HANG: Duration = Duration::from_secs(120);
/// A step's deadline where it must not expire.
const LONG: Duration = Duration::from_secs(60);

/// The GPUs that ranks take turns over: one, and two where there are two.
fn counts() -> Vec<usize> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let count = runtime.device_count(DeviceKind::Cuda).unwrap();
    (1..=count.min(2) as usize).collect()
}

/// Random cases `first..first + count` in one layout, over one GPU and over two in turn.
pub fn random(layout: KvLayout, first: u64, count: u64) {
    random_of(Shapes::All, layout, first, count);
}

/// The same of some shapes.
pub fn random_of(shapes: Shapes, layout: KvLayout, first: u64, count: u64) {
    let counts = counts();
    let mut groups: HashMap<(usize, usize), Group> = HashMap::new();
    let mut error = MeanError::default();
    let seeds = only_case().map_or_else(
        || (first..first + count).map(|index| Rng::derive(seed() ^ 0x77, 3 * index + layout as u64)).collect(),
        |case| vec![case],
    );
    let mut failures = Vec::new();
    for (n, case) in seeds.into_iter().enumerate() {
        let mut case = space::sharded(case, layout, shapes);
        // The inputs of the ranks agree, so that checking them must change nothing.
        case.desc.checked = n % 3 == 1 && !case.desc.pages_by_head;
        case.desc.query_input = QueryInput::ALL[n / 2 % 2];
        if std::env::var_os("TREEATTN_TRACE").is_some() {
            eprintln!("{}", case.describe());
        }
        let on = counts[n % counts.len()];
        let group = groups.entry((case.world, on)).or_insert_with(|| Group::over(case.world, on, LONG));
        match run(group, &case) {
            Ok(found) => error.add(&case, &found),
            Err(what) => failures.push(format!(
                "{what}\nover {on} GPUs: {}\nTREEATTN_CASE={} runs this case alone",
                case.describe(),
                case.seed
            )),
        }
    }
    let shown = failures[..failures.len().min(6)].join("\n");
    assert!(failures.is_empty(), "{} of {count} cases failed, among them\n{shown}", failures.len());
    println!("{layout:?}: {:.4} of the usual error on average", error.mean());
    error.assert_at_most(MEAN_ERROR, "ranks");
}

/// The first `count` random cases from `first` on whose ranks can have a GPU each, and whose algorithm needs no windows.
pub fn random_apart(layout: KvLayout, first: u64, count: usize) {
    let most = Runtime::new(RuntimeConfig::default()).unwrap().device_count(DeviceKind::Cuda).unwrap() as usize;
    let mut groups: HashMap<usize, Group> = HashMap::new();
    let seeds = (first..).map(|index| Rng::derive(seed() ^ 0x78, 3 * index + layout as u64));
    let cases = seeds.map(|seed| space::sharded(seed, layout, Shapes::All));
    for case in cases.filter(|case| case.world <= most && case.desc.algorithm != Algorithm::TwoShot).take(count) {
        let group = groups.entry(case.world).or_insert_with(|| Group::new(case.world, LONG));
        if let Err(what) = run(group, &case) {
            panic!("{what}\n{}", case.describe());
        }
    }
}

/// Runs a case twice; what must not matter is filled otherwise the second time.
fn run(group: &Group, case: &Case) -> Result<Comparison, String> {
    let mut ranks = ranks(case);
    let plans =
        Plan::create_all(&group.comms.iter().collect::<Vec<_>>(), &case.desc).map_err(|e| format!("plan: {e}"))?;
    let mut first = Vec::new();
    for fill in [0xff, 0x3c] {
        ranks.iter_mut().for_each(|rank| rank.prefill(fill));
        let mirrors = group.mirrors(&ranks);
        group.step(&plans, &mirrors, &mut ranks);
        if let Some(rank) = ranks.iter().position(|rank| rank.strays(case, fill) > 0) {
            return Err(format!("rank {rank} wrote beside its outputs"));
        }
        let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(case)).collect();
        if !first.is_empty() && first != bits {
            return Err("a second run has other bits".into());
        }
        first = bits;
    }
    if case.desc.output == OutputMode::Replicated && first.iter().any(|bits| *bits != first[0]) {
        return Err("ranks hold other bits".into());
    }
    if let Some(error) = group.errors().into_iter().flatten().next() {
        return Err(format!("reported: {error}"));
    }
    let found = judge_on(true, case, &ranks)?;
    match found.failure {
        Some(failure) if !found.is_within() => Err(failure),
        _ => Ok(found),
    }
}

/// Wide heads over two ranks, in all placements and outputs.
pub fn wide() {
    for on in counts() {
        let group = Group::over(2, on, LONG);
        for case in crate::wide::over_ranks() {
            let found = run(&group, &case).unwrap();
            assert_eq!(found.failure, None);
        }
    }
}

/// A cache on one rank of several, the others empty: the answer of one rank that has it all. Every rank in turn.
pub fn same_as_one() {
    let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(6, 2, 64, Dtype::F16) };
    for on in counts() {
        for world in [2, 3] {
            let group = Group::over(world, on, LONG);
            for holder in 0..world {
                let mut case = Case::plain(desc, world, &[(90, 1), (0, 1), (40, 2)], Values::Normal, 4);
                for sequence in &mut case.sequences {
                    sequence.held = (0..world)
                        .map(|rank| if rank == holder { (0..sequence.keys).collect() } else { Vec::new() })
                        .collect();
                }
                case.desc.max_kv_length = 90;
                let found = run(&group, &case).unwrap();
                assert_eq!(found.failure, None);
            }
        }
    }
}

/// Partial outputs past the largest f16 travel as that, and never as infinities; NaN stays what it is.
pub fn values_beyond_the_wire() {
    let group = Group::over(2, 1, LONG);
    let base = shape(8, 2, 64, Dtype::Bf16);
    let desc = AttentionDesc { wire_dtype: Dtype::F16, out_dtype: Dtype::F32, ..base };
    let mut case = Case::plain(desc, 2, &[(40, 1), (40, 1)], Values::Normal, 3);
    case.sequences[0].v.fill(-1e6);
    case.sequences[1].v.fill(1e6);
    case.sequences[1].v[5] = f32::NAN;
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    group.step(&plans, &mirrors, &mut all);
    for (rank, head) in all.iter().flat_map(|rank| (0..8).map(move |head| (rank, head))) {
        for (token, largest) in [(0, -65504.0), (1, 65504.0)] {
            for (d, x) in rank.row(&case, token, head).0.into_iter().enumerate() {
                let is_bad = token == 1 && head < 4 && d == 5;
                assert!(if is_bad { x.is_nan() } else { (x - largest).abs() <= 0.1 }, "{token} {head} {d}: {x}");
            }
        }
    }
}

/// Steps with more rows than a slot holds, on ranks that share GPUs, in turn with small steps of the same plan.
pub fn slotfuls() {
    // Both worlds, and each number of GPUs, but not every pair of them: an emulator takes its time.
    for (on, world) in [(1, 3), (counts().len(), 2)] {
        let group = Group::over(world, on, LONG);
        let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(16, 2, 128, Dtype::F16) };
        for (algorithm, output) in [
            (Algorithm::OneShot, OutputMode::Replicated),
            (Algorithm::TwoShot, OutputMode::Replicated),
            (Algorithm::Auto, OutputMode::Scattered),
        ] {
            let desc = AttentionDesc { algorithm, output, ..base };
            // 2,096 rows of 520 bytes; a slot has 1 MiB.
            let large = Case::plain(desc, world, &[(30, 100), (9, 31)], Values::Normal, 8);
            let small = Case::plain(large.desc, world, &[(25, 1), (0, 1)], Values::Normal, 9);
            let plans = group.plans(&large.desc);
            let cases = [large, small];
            let mut all = cases.each_ref().map(ranks);
            let mirrors = all.each_ref().map(|ranks| group.mirrors(ranks));
            let mut first = [Vec::new(), Vec::new()];
            for round in 0..2 {
                mirrors.iter().for_each(|mirrors| group.enqueue(&plans, mirrors));
                group.gpus.iter().for_each(|gpu| gpu.stream.synchronize().unwrap());
                for (n, ranks) in all.iter_mut().enumerate() {
                    mirrors[n].iter().zip(&mut *ranks).for_each(|(mirror, rank)| mirror.fetch(rank));
                    assert_eq!(judge(&cases[n], ranks).unwrap().failure, None);
                    let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(&cases[n])).collect();
                    assert!(round == 0 || bits == first[n], "other bits in a second round");
                    first[n] = bits;
                }
            }
            let (stats, shots) = (plans[0].stats().unwrap(), if algorithm == Algorithm::TwoShot { 2 } else { 1 });
            assert_eq!((stats.steps, stats.rounds), (4, 2 * (2 + 1) * shots), "two slotfuls, and one");
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}
