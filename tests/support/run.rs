//! Runs cases on all ranks and holds the answers against float64.

use std::collections::HashMap;
use std::time::Duration;

use treeattn::attention::reference::{self, Comparison, Precision, Reference};
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, MaskKind, OutputMode, QueryInput, ScoreMod, Step};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};
use treeattn::{ErrorKind, Result};

use super::case::Case;
use super::rank::Rank;
use super::rng::Rng;
use super::values::Values;

/// A communicator of local CPU ranks with what it takes to drive it.
pub struct Group {
    pub runtime: Runtime,
    pub ranks: Vec<Communicator>,
    pub streams: Vec<Stream>,
}

impl Group {
    pub fn new(isa: &str, world: usize, threads: usize) -> Group {
        Group::over_nodes(isa, world, threads, &[])
    }

    /// Ranks grouped into nodes.
    pub fn over_nodes(isa: &str, world: usize, threads: usize, nodes: &[i32]) -> Group {
        let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
        let runtime = Runtime::new(RuntimeConfig { cpu_isa: Some(isa.into()) }).expect("an instruction set it has");
        let config = CommConfig {
            threads_per_rank: threads,
            node_groups: nodes.to_vec(),
            // A guard against hangs only: the machine may be busy.
            step_timeout: Duration::from_secs(60),
            ..CommConfig::default()
        };
        let ranks = Communicator::create_local(&runtime, &vec![cpu; world], &config).expect("a local group");
        let streams = (0..world).map(|_| Stream::new(&runtime, cpu).expect("a stream")).collect();
        Group { runtime, ranks, streams }
    }

    pub fn plans(&self, desc: &AttentionDesc) -> Result<Vec<Plan>> {
        Plan::create_all(&self.ranks.iter().collect::<Vec<_>>(), desc)
    }
}

/// Which call a step makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Decode,
    Partial,
}

/// One step on all ranks: on streams, or on a thread a rank. What each rank returned.
pub fn step(group: &Group, plans: &[Plan], ranks: &[Rank], streams: bool, call: Call) -> Vec<Result<()>> {
    let one = |rank: usize, stream: Option<&Stream>| {
        let (plan, args) = (&plans[rank], &ranks[rank].args);
        // SAFETY: the ranks' memory outlives the step, which is waited for below.
        unsafe {
            match call {
                Call::Decode => plan.decode(args, stream),
                Call::Partial => plan.partial(args, stream),
            }
        }
    };
    if streams {
        let enqueued: Vec<_> = (0..plans.len()).map(|rank| one(rank, Some(&group.streams[rank]))).collect();
        return enqueued.into_iter().zip(&group.streams).map(|(e, stream)| stream.synchronize().and(e)).collect();
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plans.len()).map(|rank| scope.spawn(move || one(rank, None))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic in a step")).collect()
    })
}

/// Float64 over one rank's shard, read from the rank's own memory.
pub fn shard_reference(case: &Case, ranks: &[Rank], rank: usize) -> Reference {
    let desc = &AttentionDesc { query_input: QueryInput::Replicated, ..case.desc };
    let q = ranks[rank].all_queries.as_ref().map_or(ranks[rank].args.q, |(_, q)| *q);
    let args = &DecodeArgs { q, ..ranks[rank].args };
    let checked = Step::new(desc, case.shard(rank), args, ranks[rank].heads.len() as i32).expect("a valid step");
    // SAFETY: the rank's memory is what its arguments say.
    unsafe { reference::attend(desc, case.shard(rank), &checked) }.expect("a shape that the reference knows")
}

/// The error of f32 outputs as a part of the usual error: its mean in each case, averaged over cases. Outputs of a case that
/// share a badly rounded score are alike, so that the number of large errors tells nothing; what an arithmetic loses tells here.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeanError {
    cases: u64,
    sum: f64,
}

impl MeanError {
    pub fn add(&mut self, case: &Case, found: &Comparison) {
        // Huge scores tell nothing but the range of an average.
        let counts = case.desc.out_dtype == Dtype::F32 && case.values != Values::Huge && found.elements > 0;
        if counts && case.desc.wire_dtype == Dtype::F32 && found.is_within() {
            self.cases += 1;
            self.sum += found.mean();
        }
    }

    pub fn mean(self) -> f64 {
        self.sum / (self.cases as f64).max(1.0)
    }

    /// Asserts that it is `usual` at most, and six standard deviations of such a mean more: those of a case are no larger than
    /// `usual` and a half.
    pub fn assert_at_most(self, usual: f64, name: &str) {
        let most = usual + 6.0 * 1.5 * usual / (self.cases as f64).max(1.0).sqrt();
        assert!(self.mean() <= most, "{name}: {self:?}, wanted {most} at most on average");
    }
}

/// That error on CPUs, rounded up: 0.017 and 0.020 were measured of ordinary shapes and of those with modified scores.
const MEAN_ERRORS: [f64; 2] = [0.02, 0.023];

/// What a batch of cases added up to.
#[derive(Debug, Default)]
pub struct Tally {
    pub cases: usize,
    /// By output type: f32, f16, bf16; partials travelled as f32.
    pub by_dtype: [Comparison; 3],
    /// The same, of normal values only: not of scores or of cancelling sums that take what float32 has beyond 16 bits. Nor where
    /// the output is about one value, be it of a key or two or of all alike: those of f16 lie just between two bf16 often.
    pub normal: [Comparison; 3],
    /// Those of shapes that cap scores or add to them, or have scales of keys.
    pub modified: Comparison,
    /// Those whose partials were rounded on the wire.
    pub narrow_wire: Comparison,
    /// Of `by_dtype` and of `modified`.
    errors: [MeanError; 2],
    /// The case of `normal` with the fewest correctly rounded outputs for its size: how many were not, and what it is.
    misrounded: (u64, String),
    pub bits_compared: u64,
}

impl Tally {
    fn add(&mut self, case: &Case, found: &Comparison) {
        let narrow = case.desc.wire_dtype != Dtype::F32;
        let modified = case.k_scale.is_some() || case.desc.softcap > 0.0 || ScoreMod::of(&case.desc, false).adds();
        let to = match (modified, narrow) {
            (true, _) => &mut self.modified,
            (false, true) => &mut self.narrow_wire,
            (false, false) => &mut self.by_dtype[case.desc.out_dtype as usize - 1],
        };
        to.add(found);
        self.errors[usize::from(modified)].add(case, found);
        // Means of coarse values, under the equal weights of coarse keys, and of one value alone, often lie halfway between two
        // 16-bit numbers, where any error decides.
        let coarse = !case.desc.k_dtype.is_float() || !case.desc.v_dtype.is_float();
        let few = case.desc.mask != MaskKind::None
            || (1..10).contains(&case.desc.window)
            || case.k_broadcast[1]
            || case.v_broadcast[1];
        if !narrow && !modified && !few && case.values == Values::Normal && !coarse {
            self.normal[case.desc.out_dtype as usize - 1].add(found);
            let wrong = found.elements - found.correctly_rounded;
            if case.desc.out_dtype != Dtype::F32 && wrong > self.misrounded.0 {
                self.misrounded = (wrong, case.describe());
            }
        }
        self.cases += 1;
    }

    /// The same of cases of [`random`](super::random), whose errors are as small on average as those of any others.
    pub fn finish_random(&self, name: &str) {
        self.finish(name);
        for (error, usual) in self.errors.iter().zip(MEAN_ERRORS) {
            error.assert_at_most(usual, name);
        }
    }

    /// Says what was found, and asserts what single cases cannot show: the share of correctly rounded 16-bit outputs, of normal
    /// values.
    pub fn finish(&self, name: &str) {
        self.tell(name);
        for (found, least) in [(&self.normal[1], 0.98), (&self.normal[2], 0.99)] {
            assert!(
                found.elements < 1000 || found.rounded_share() >= least,
                "{name}: {found:?}\nmost of one case: {:?}",
                self.misrounded
            );
        }
    }

    fn tell(&self, name: &str) {
        let [f32s, f16s, bf16s] = &self.by_dtype;
        println!(
            "{name}: {} cases; f32 {} elements, largest error {:.3} of its bound; f16 {}, {:.3}, {:.4} correctly rounded; \
             bf16 {}, {:.3}, {:.4}; 16-bit wire {}, {:.3}; modified scores {}, {:.3}; lse {:.3}",
            self.cases,
            f32s.elements,
            f32s.worst,
            f16s.elements,
            f16s.worst,
            f16s.rounded_share(),
            bf16s.elements,
            bf16s.worst,
            bf16s.rounded_share(),
            self.narrow_wire.elements,
            self.narrow_wire.worst,
            self.modified.elements,
            self.modified.worst,
            self.by_dtype.iter().map(|c| c.worst_lse).fold(0.0, f64::max),
        );
        let all = || self.by_dtype.iter().chain([&self.narrow_wire, &self.modified]);
        let (broken, elements) = all().fold((0, 0), |(b, e), c| (b + c.broken, e + c.elements));
        let share = |of: fn(&Comparison) -> f64| all().map(of).fold(0.0, f64::max);
        let (o, lse) = (share(|c| c.worst_guaranteed), share(|c| c.worst_lse_guaranteed));
        let [plain, modified] = self.errors;
        println!(
            "{name}: {broken} of {elements} outputs above the usual error, {} of them modified; on average {:.4} of it in {} cases, \
             {:.4} in {} modified ones; {o:.3} of the guaranteed error, lse {lse:.3}",
            self.modified.broken,
            plain.mean(),
            plain.cases,
            modified.mean(),
            modified.cases
        );
    }
}

/// Communicators by (instruction set, ranks, threads, nodes), kept from case to case.
#[derive(Default)]
pub struct Pool {
    groups: HashMap<(String, usize, usize, Vec<i32>), Group>,
    pub tally: Tally,
}

impl Pool {
    pub fn group(&mut self, case: &Case) -> &Group {
        let (isa, world, threads) = (&case.isa, case.world, case.threads);
        let key = (isa.clone(), world, threads, case.nodes.clone());
        self.groups.entry(key).or_insert_with(|| Group::over_nodes(isa, world, threads, &case.nodes))
    }

    /// Lets the communicators go.
    pub fn forget(&mut self) {
        self.groups.clear();
    }

    /// Runs a case that all ranks are to finish, and checks everything that is promised of it.
    pub fn check(&mut self, case: &Case) {
        if let Err(what) = self.try_check(case) {
            panic!("{what}");
        }
    }

    /// Runs one step of a case over memory as it stands, after filling the outputs with 0xff.
    pub fn step(&mut self, case: &Case, ranks: &mut [Rank], call: Call) -> Vec<Result<()>> {
        let group = self.group(case);
        let plans = group.plans(&case.desc).expect("plans of a shape that is served");
        ranks.iter_mut().for_each(|rank| rank.prefill(0xff));
        step(group, &plans, ranks, case.streams, call)
    }

    /// The same over fresh memory, for a case that all ranks are to finish.
    pub fn answers(&mut self, case: &Case) -> Vec<Rank> {
        let mut ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(case, rank)).collect();
        for result in self.step(case, &mut ranks, Call::Decode) {
            result.unwrap_or_else(|error| panic!("{error}\n{}", case.describe()));
        }
        ranks
    }

    /// The same, for batches that go on after a failure.
    pub fn try_check(&mut self, case: &Case) -> std::result::Result<(), String> {
        let told = |what| format!("{what}\n{}\nTREEATTN_CASE={} runs this case alone", case.describe(), case.seed);
        self.run(case).map_err(told)
    }

    fn run(&mut self, case: &Case) -> std::result::Result<(), String> {
        let mut ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(case, rank)).collect();
        let group = self.group(case);
        let plans = group.plans(&case.desc).map_err(|error| format!("plans: {error}"))?;
        let mut runs = Vec::new();
        // Twice, with another fill of what must not matter.
        for fill in [0xff, 0x3c] {
            ranks.iter_mut().for_each(|rank| rank.prefill(fill));
            for (rank, result) in step(group, &plans, &ranks, case.streams, Call::Decode).into_iter().enumerate() {
                result.map_err(|error| format!("decode on rank {rank}: {error}"))?;
            }
            for (rank, memory) in ranks.iter().enumerate() {
                let strays = memory.strays(case, fill);
                if strays > 0 {
                    return Err(format!("rank {rank}: {strays} bytes beside the outputs were written"));
                }
            }
            runs.push(ranks.iter().map(|rank| rank.bits(case)).collect::<Vec<_>>());
        }
        same("a second run", &runs[0], &runs[1])?;
        if case.desc.output == OutputMode::Replicated {
            for bits in &runs[0][1..] {
                same("another rank", &runs[0][..1], std::slice::from_ref(bits))?;
            }
        }
        self.tally.bits_compared += runs[0].iter().map(|bits| bits.len() as u64).sum::<u64>();
        let found = judge(case, &ranks)?;
        self.tally.add(case, &found);
        let guaranteed = found.worst_guaranteed.max(found.worst_lse_guaranteed);
        match found.failure {
            _ if guaranteed > 1.0 => Err(format!("{guaranteed} of the guaranteed error: {:?}", found.failure)),
            Some(failure) if !found.is_within() => Err(failure),
            _ => Ok(()),
        }
    }
}

fn same(what: &str, a: &[Vec<u32>], b: &[Vec<u32>]) -> std::result::Result<(), String> {
    for (a, b) in a.iter().zip(b) {
        if let Some(i) = (0..a.len().max(b.len())).find(|&i| a.get(i) != b.get(i)) {
            return Err(format!("{what} has other bits at value {i}: {:x?} and {:x?}", a.get(i), b.get(i)));
        }
    }
    Ok(())
}

/// Holds what lies in the ranks' outputs against float64: merged over all ranks, or each rank's own for local outputs.
pub fn judge(case: &Case, ranks: &[Rank]) -> std::result::Result<Comparison, String> {
    judge_on(false, case, ranks)
}

/// The same; `tensor_cores`: of a backend that multiplies f16 values on those.
pub fn judge_on(tensor_cores: bool, case: &Case, ranks: &[Rank]) -> std::result::Result<Comparison, String> {
    let mut shards: Vec<Reference> = (0..case.world).map(|rank| shard_reference(case, ranks, rank)).collect();
    let local = case.desc.output == OutputMode::Local;
    let mut merged = reference::merge(&shards).map_err(|error| error.to_string())?;
    if tensor_cores && case.desc.v_dtype == Dtype::F16 {
        shards.iter_mut().chain([&mut merged]).for_each(Reference::multiply_f16);
    }
    let alone = local || case.world == 1;
    let precision = Precision { out: case.desc.out_dtype, wire: if alone { Dtype::F32 } else { case.desc.wire_dtype } };
    cross_check(case, &merged, None)?;
    let mut found = Comparison::default();
    for (rank, memory) in ranks.iter().enumerate() {
        let wanted = if local { &shards[rank] } else { &merged };
        if local {
            cross_check(case, wanted, Some(rank))?;
        }
        if case.desc.output == OutputMode::Replicated && rank > 0 {
            // The same bits as rank 0.
            break;
        }
        for token in 0..case.tokens {
            for head in memory.heads.clone() {
                let row = token * case.desc.q_heads as usize + head;
                let lse = memory.lse_of(case, token, head);
                wanted.compare_row(row, &memory.row(case, token, head).0, lse, precision, &mut found);
            }
        }
    }
    Ok(found)
}

/// Holds the library's reference itself against the textbook formula over the global arrays, on a few rows.
fn cross_check(case: &Case, wanted: &Reference, rank: Option<usize>) -> std::result::Result<(), String> {
    let mut r = Rng::new(case.seed ^ 0x5eed);
    for _ in 0..if case.tokens == 0 { 0 } else { 3 } {
        let (token, head) = (r.range(0, case.tokens - 1), r.range(0, case.desc.q_heads as usize - 1));
        let row = token * case.desc.q_heads as usize + head;
        let (o, lse) = case.answer(token, head, rank);
        // Sums in another order, scaled by what float64 leaves of large scores.
        let slack = 1e-12 * (1.0 + wanted.score[row]);
        let close = |a: f64, b: f64, scale: f64| a == b || (a - b).abs() <= slack * scale || a.is_nan() && b.is_nan();
        let near = |d: usize| {
            let scale = (wanted.weighted[row * wanted.dim + d]).max(f64::MIN_POSITIVE);
            slack > 0.1 || close(wanted.row(row)[d], o[d], scale)
        };
        if !close(wanted.lse[row], lse, 1.0) || !(0..wanted.dim).all(near) {
            return Err(format!(
                "the reference at row {row} (rank {rank:?}): {:?} against {lse} {o:?}",
                wanted.row(row)
            ));
        }
    }
    Ok(())
}

/// Asserts that every rank reports bad data in `sequence`.
pub fn assert_bad_data(results: &[Result<()>], sequence: usize, argument: &str) {
    for (rank, result) in results.iter().enumerate() {
        let error = result.as_ref().expect_err("bad data is reported");
        assert_eq!(error.kind(), ErrorKind::InvalidData, "rank {rank}: {error}");
        let text = error.message();
        assert!(text.contains(&format!("sequence {sequence} ")), "rank {rank}: {text}, wanted sequence {sequence}");
        assert!(text.contains(argument), "rank {rank}: {text}, wanted {argument}");
    }
}
