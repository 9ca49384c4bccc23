//! The self-check: a shape run on this machine and held against the float64 reference.
//!
//! `inputs` makes random sequences and says which rank holds what, `shard` lays a rank's part out in memory as the
//! descriptor says, `judge` compares; `types` is what callers give and get.

mod inputs;
mod judge;
mod shard;
mod types;

use self::inputs::{Inputs, Sizes};
use self::judge::{Expected, Tally};
use self::shard::ShardBuffers;
use self::types::Results;
pub use self::types::{SelfcheckConfig, SelfcheckReport};
use super::communicator::Communicator;
use super::context::Runtime;
use super::plan::{Plan, attention_supported};
use super::stream::Stream;
use crate::attention::{AttentionDesc, OutputMode, Shard, head_range};
use crate::comm::CommConfig;
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};

/// Makes random inputs for the shape of `desc`, shards them over local ranks as the descriptor places them, decodes twice and
/// compares every output with float64 sums. `devices`: where each rank lives, all CPUs or all GPUs; or one device, on which all
/// `config.ranks` ranks live.
///
/// The usual error, with A = sum_j w_j |v_j| of an element and R = max_j scale sum_i |q_i k_ij| of its row: 2^-24 (4 + 2 R) A
/// of an output, plus 1 ulp of a 16-bit output (and one rounding of a 16-bit wire); 4 ulp of max(1, |lse|, R) of an lse. A check
/// passes where nothing errs by more than three times that, and at least 99 % (bf16) or 98 % (f16) of the outputs are correctly
/// rounded, with four standard deviations of slack where they are few. Dead memory (slots past a length, unused pages) holds NaN.
///
/// A check that fails is a report with `passed` false, not an error. Errors: `InvalidArgument` for sizes that the
/// descriptor has no room for, `Unsupported` as plan creation, `NoMemory`, and whatever the steps themselves return.
/// Blocks; takes time proportional to rows x keys. Starts and joins its own threads. May be called from any thread.
pub fn selfcheck(
    runtime: &Runtime,
    devices: &[Device],
    desc: &AttentionDesc,
    config: &SelfcheckConfig,
) -> Result<SelfcheckReport> {
    let Some((&device, others)) = devices.split_first() else {
        return Err(Error::invalid("devices", "none", "one for all ranks, or one a rank"));
    };
    for &other in devices {
        if other.kind != device.kind {
            return Err(Error::invalid("devices", other, "CPUs only, or GPUs only"));
        }
        attention_supported(runtime, other, desc)?;
    }
    if desc.is_merge_only() {
        return Err(Error::invalid("kv_heads", 0, "at least 1 (a merge-only plan has no attention to check)"));
    }
    let mut config = *config;
    match (config.ranks, others.len() as i32 + 1) {
        (0, 1) if device.kind == DeviceKind::Cuda => config.ranks = 1,
        (0, 1) | (_, 1) => {}
        (0, several) => config.ranks = several,
        (ranks, several) if ranks != several => {
            return Err(Error::invalid("ranks", ranks, format!("0 or {several}, the number of devices")));
        }
        _ => {}
    }
    let sizes = Sizes::resolve(desc, &config)?;
    if desc.output == OutputMode::Weighted && sizes.ranks > 1 {
        let wanted = "REPLICATED, SCATTERED or LOCAL in a self-check of several ranks, which judges each rank's output by itself";
        return Err(Error::unsupported("output", desc.output.name(), wanted));
    }
    let inputs = Inputs::random(desc, sizes)?;
    let devices = if others.is_empty() { vec![device; sizes.ranks] } else { devices.to_vec() };
    let (first, second) = run_twice(runtime, &devices, desc, &inputs)?;
    compare(device.kind, desc, &inputs, &first, &second)
}

/// Holds the results of two runs, rank by rank, against float64 sums and against each other.
fn compare(
    kind: DeviceKind,
    desc: &AttentionDesc,
    inputs: &Inputs,
    first: &[Results],
    second: &[Results],
) -> Result<SelfcheckReport> {
    let sizes = inputs.sizes;
    let mut tally = Tally::new(desc, sizes.ranks);
    let whole = if desc.output == OutputMode::Local { None } else { Some(Expected::new(kind, desc, inputs, None)?) };
    for rank in 0..sizes.ranks {
        let own = if whole.is_none() { Some(Expected::new(kind, desc, inputs, Some(rank))?) } else { None };
        if let Some(expected) = whole.as_ref().or(own.as_ref()) {
            tally.rank(rank, heads(desc, rank, sizes.ranks)?, &first[rank], expected);
        }
        if let Some(byte) = first_difference(&first[rank], &second[rank]) {
            tally.differs(format!("a second run on rank {rank} differs from byte {byte} on"));
        }
        if desc.output == OutputMode::Replicated
            && let Some(byte) = first_difference(&first[0], &first[rank])
        {
            tally.differs(format!("rank {rank} differs from rank 0 from byte {byte} on"));
        }
    }
    Ok(tally.report())
}

/// Shards over a rank a device, decodes twice, and gives each run's results rank by rank.
fn run_twice(
    runtime: &Runtime,
    devices: &[Device],
    desc: &AttentionDesc,
    inputs: &Inputs,
) -> Result<(Vec<Results>, Vec<Results>)> {
    let ranks = inputs.sizes.ranks;
    // Declared before the streams, which on every way out finish their work before the buffers go.
    let mut shards = Vec::with_capacity(ranks);
    for (rank, &device) in devices.iter().enumerate() {
        let out_heads = heads(desc, rank, ranks)?.len();
        shards.push(ShardBuffers::new(runtime, device, desc, inputs, rank, out_heads)?);
    }
    let comms = Communicator::create_local(runtime, devices, &CommConfig::default())?;
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), desc)?;
    let streams = devices.iter().map(|&device| Stream::new(runtime, device)).collect::<Result<Vec<_>>>()?;
    let step = || -> Result<Vec<Results>> {
        for shard in &shards {
            shard.poison()?;
        }
        for ((plan, shard), stream) in plans.iter().zip(&shards).zip(&streams) {
            // SAFETY: the shard's buffers outlive the streams, and nobody touches them before the streams are done. Each plan has
            // its own communicator and one stream.
            unsafe { plan.decode(&shard.args, Some(stream)) }?;
        }
        for stream in &streams {
            stream.synchronize()?;
        }
        shards.iter().map(ShardBuffers::results).collect()
    };
    let results = step().and_then(|first| Ok((first, step()?)));
    if results.is_err() {
        // Ranks that wait for one whose step was refused need not wait for the deadline.
        comms[0].abort()?;
    }
    results
}

/// The heads in the output of `rank`.
fn heads(desc: &AttentionDesc, rank: usize, ranks: usize) -> Result<std::ops::Range<usize>> {
    match desc.output {
        OutputMode::Scattered => {
            let heads = head_range(desc.q_heads, Shard { rank: rank as i32, world: ranks as i32 })?;
            Ok(heads.start as usize..heads.end as usize)
        }
        OutputMode::Replicated | OutputMode::Local | OutputMode::Weighted => Ok(0..desc.q_heads as usize),
    }
}

/// The first byte in which two results differ, out before lse.
fn first_difference(a: &Results, b: &Results) -> Option<usize> {
    let differs = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
    differs(&a.0, &b.0).or_else(|| Some(a.0.len() + differs(&a.1, &b.1)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Dtype, KvLayout, MaskKind, Placement};
    use crate::error::ErrorKind;
    use crate::runtime::RuntimeConfig;

    #[test]
    fn shapes_of_every_kind_pass() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let mut desc = AttentionDesc::new(6, 2, 24, 500);
        (desc.max_batch, desc.max_query_tokens) = (3, 9);
        let placements = [Placement::Contiguous, Placement::Interleaved { run: 3 }, Placement::Explicit];
        let layouts = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages];
        let outputs = [OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local];
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        for seed in 0..27 {
            let at = |power: usize| seed / power % 3;
            (desc.placement, desc.kv_layout, desc.output) = (placements[at(1)], layouts[at(3)], outputs[at(9)]);
            desc.page_size = if desc.kv_layout == KvLayout::Strided { 0 } else { 7 };
            (desc.k_dtype, desc.out_dtype) = (dtypes[at(1)], dtypes[(at(3) + at(1)) % 3]);
            desc.causal = seed % 2 == 0;
            (desc.window, desc.sinks) = ([0, 50, 9][(seed / 2) % 3], seed % 5 > 2);
            (desc.softcap, desc.alibi) = ([0.0, 30.0, 0.5][(seed / 5) % 3], seed % 7 > 3);
            (desc.mask, desc.mask_dtype) = [
                (MaskKind::None, None),
                (MaskKind::Boolean, None),
                (MaskKind::Additive, Some(Dtype::F16)),
                (MaskKind::Additive, Some(Dtype::F32)),
            ][(seed / 4) % 4];
            let config = SelfcheckConfig {
                ranks: 1 + (seed % 4) as i32,
                batch: 3,
                query_tokens: 1 + (seed % 3) as i32,
                kv_length: 3 + 8 * seed as i32,
                seed: seed as u64,
            };
            let report = selfcheck(&runtime, &[Device::CPU], &desc, &config).unwrap();
            assert!(report.passed, "seed {seed}: {}", report.message);
            assert!(report.rows > 0 && report.max_lse_error_ratio > 0.0, "seed {seed}: {report:?}");
        }
    }

    /// One bit is enough, also where every number is within its bounds.
    #[test]
    fn bits_that_differ_between_runs_or_ranks_do_not_pass() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        for output in [OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local] {
            let desc = AttentionDesc { output, ..AttentionDesc::new(4, 2, 8, 50) };
            let sizes = Sizes::resolve(&desc, &SelfcheckConfig::default()).unwrap();
            let inputs = Inputs::random(&desc, sizes).unwrap();
            let (first, second) = run_twice(&runtime, &[Device::CPU; 2], &desc, &inputs).unwrap();
            let changed = |results: &[Results]| {
                let mut results = results.to_vec();
                let last = results[1].1.len() - 4;
                results[1].1[last] ^= 1;
                results
            };
            let report = compare(DeviceKind::Cpu, &desc, &inputs, &first, &second).unwrap();
            assert!(report.passed && report.same_bits, "{output:?}: {report:?}");
            let report = compare(DeviceKind::Cpu, &desc, &inputs, &first, &changed(&second)).unwrap();
            assert!(!report.passed && !report.same_bits, "{output:?}: {report:?}");
            assert!(report.message.starts_with("a second run on rank 1 differs"), "{output:?}: {report:?}");
            // Only ranks with the whole output have the same.
            let report = compare(DeviceKind::Cpu, &desc, &inputs, &changed(&first), &changed(&second)).unwrap();
            let passes = output != OutputMode::Replicated;
            assert_eq!((report.passed, report.same_bits), (passes, passes), "{output:?}: {report:?}");
            assert!(passes || report.message.starts_with("rank 1 differs from rank 0"), "{output:?}: {report:?}");
        }
    }

    #[test]
    fn sizes_without_room_are_named() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let desc = AttentionDesc::new(2, 2, 8, 10);
        let check = |config: SelfcheckConfig| selfcheck(&runtime, &[Device::CPU], &desc, &config);
        assert!(check(SelfcheckConfig::default()).unwrap().passed);
        for (name, config) in [
            ("ranks", SelfcheckConfig { ranks: -1, ..Default::default() }),
            ("batch", SelfcheckConfig { batch: 2, ..Default::default() }),
            ("query_tokens", SelfcheckConfig { query_tokens: 2, ..Default::default() }),
            ("kv_length", SelfcheckConfig { kv_length: 21, ..Default::default() }),
            ("kv_length", SelfcheckConfig { kv_length: i32::MAX, ..Default::default() }),
            ("ranks", SelfcheckConfig { ranks: i32::MAX, ..Default::default() }),
        ] {
            let error = check(config).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.message().starts_with(name), "{error}");
        }
        let large =
            AttentionDesc { max_kv_length: i32::MAX, max_batch: i32::MAX, max_query_tokens: i32::MAX / 2, ..desc };
        for config in [
            SelfcheckConfig { kv_length: i32::MAX, ..Default::default() },
            SelfcheckConfig { batch: i32::MAX / 2, ..Default::default() },
            SelfcheckConfig { query_tokens: i32::MAX / 4, ..Default::default() },
        ] {
            let error = selfcheck(&runtime, &[Device::CPU], &large, &config).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoMemory, "{error}");
        }
        let three = [Device::CPU; 3];
        assert_eq!(selfcheck(&runtime, &three, &desc, &SelfcheckConfig::default()).unwrap().rows, 3 * 2);
        let two = SelfcheckConfig { ranks: 2, ..Default::default() };
        let error = selfcheck(&runtime, &three, &desc, &two).unwrap_err();
        assert_eq!(error.message(), "ranks: found 2, wanted 0 or 3, the number of devices");
        assert!(selfcheck(&runtime, &[], &desc, &two).unwrap_err().message().starts_with("devices: found none"));
        let mixed = [Device::CPU, Device { kind: DeviceKind::Cuda, ordinal: 0 }];
        let error = selfcheck(&runtime, &mixed, &desc, &two).unwrap_err();
        assert_eq!(error.message(), "devices: found cuda:0, wanted CPUs only, or GPUs only");
        let merge_only = AttentionDesc { kv_heads: 0, ..desc };
        let error = selfcheck(&runtime, &[Device::CPU], &merge_only, &SelfcheckConfig::default()).unwrap_err();
        assert!(error.message().starts_with("kv_heads"), "{error}");
    }
}
