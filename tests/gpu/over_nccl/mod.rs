//! Steps over NCCL, on as many GPUs as there are, up to four: `ALLREDUCE3` or, with `TREEATTN_GPU_EXCHANGE=nccl`, one allgather;
//! with `TREEATTN_TEST_NODES=2` four ranks that count as two nodes; with `TREEATTN_TEST_QUERIES=by heads` of ranks that pass the
//! queries of their own heads.

mod faults;
mod groupings;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Placement, QueryInput, Tensor};
use treeattn::runtime::{
    Buffer, CommConfig, Communicator, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream,
};

use crate::driver::{Current, RawStream};
use crate::group::{Group, nodes, ranks};
use crate::mirror::{Gpu, Mirror};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::run::judge;
use crate::support::values::Values;

pub use faults::{a_rank_that_does_not_come, a_rank_that_leaves, bad_data, out_of_step};
pub use groupings::{groupings, nodes_of_one};

/// Far more than anything here takes.
const HANG: Duration = Duration::from_secs(120);

fn runtime() -> Runtime {
    Runtime::new(RuntimeConfig::default()).unwrap()
}

pub fn count() -> i32 {
    runtime().device_count(DeviceKind::Cuda).unwrap().min(4)
}

/// Why these tests cannot run here.
pub fn missing() -> Option<String> {
    if count() < 2 {
        return Some("fewer than two GPUs".into());
    }
    Communicator::nccl_unique_id(&runtime()).err().map(|error| error.to_string())
}

/// Whether the process was started for steps with one allgather, among ranks or among nodes.
fn gathers() -> bool {
    nodes().is_some() || std::env::var_os("TREEATTN_GPU_EXCHANGE").is_some_and(|word| word == "nccl")
}

/// A group of as many ranks as there are GPUs, or of two nodes of two.
fn group(step_timeout: Duration) -> Group {
    match nodes() {
        Some(_) => Group::over(4, count() as usize, step_timeout),
        None => Group::new(count() as usize, step_timeout),
    }
}

/// A plan whose steps go over NCCL.
fn over_nccl(desc: AttentionDesc) -> AttentionDesc {
    let by_heads = std::env::var_os("TREEATTN_TEST_QUERIES").is_some_and(|word| word == "by heads");
    let query_input = if by_heads { QueryInput::Scattered } else { desc.query_input };
    AttentionDesc { algorithm: if gathers() { Algorithm::Auto } else { Algorithm::Allreduce3 }, query_input, ..desc }
}

/// Outputs against float64: every output mode and type, empty shards and sequences, several query tokens.
pub fn numbers() {
    let half = shape(8, 2, 64, Dtype::F16);
    let mut shapes = vec![
        half,
        AttentionDesc { out_dtype: Dtype::F32, ..shape(6, 6, 128, Dtype::Bf16) },
        AttentionDesc { output: OutputMode::Scattered, out_dtype: Dtype::F32, ..half },
        AttentionDesc { output: OutputMode::Scattered, causal: true, ..shape(5, 1, 128, Dtype::Bf16) },
        AttentionDesc { placement: Placement::Interleaved { run: 4 }, causal: true, ..half },
    ];
    if gathers() {
        let wide = AttentionDesc { out_dtype: Dtype::F32, ..shape(4, 2, 256, Dtype::Bf16) };
        shapes.extend([Dtype::F16, Dtype::Bf16].map(|wire_dtype| AttentionDesc { wire_dtype, ..wide }));
    }
    for world in if nodes().is_some() { 4..=4 } else { 2..=count() as usize } {
        let group = Group::over(world, world.min(count() as usize), Duration::from_secs(10));
        for (i, &desc) in shapes.iter().enumerate() {
            let sequences: [&[(usize, usize)]; 3] = [&[(300, 1)], &[(130, 3), (0, 1), (1, 1)], &[(0, 2)]];
            for (j, sequences) in sequences.into_iter().enumerate() {
                let case = Case::plain(over_nccl(desc), world, sequences, Values::Normal, (10 * i + j) as u64);
                let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
                let mut first = Vec::new();
                // Twice, with other bytes in the outputs beforehand.
                for fill in [0xff, 0x3c] {
                    ranks.iter_mut().for_each(|rank| rank.prefill(fill));
                    let mirrors = group.mirrors(&ranks);
                    group.step(&plans, &mirrors, &mut ranks);
                    assert!(ranks.iter().all(|rank| rank.strays(&case, fill) == 0), "{}", case.describe());
                    let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(&case)).collect();
                    assert!(first.is_empty() || first == bits, "other bits\n{}", case.describe());
                    let is_everywhere = gathers() && case.desc.output == OutputMode::Replicated;
                    assert!(!is_everywhere || bits.iter().all(|rank| *rank == bits[0]), "{}", case.describe());
                    first = bits;
                }
                let found = judge(&case, &ranks).unwrap();
                assert_eq!(found.failure, None, "{}", case.describe());
                for comm in &group.comms {
                    assert!(comm.status().unwrap().error.is_none());
                }
            }
        }
    }
}

/// Queries by heads give the bits of those of all heads; they are refused where ranks are of several nodes, or add up.
pub fn queries() {
    for world in 2..=count() as usize {
        let group = Group::new(world, Duration::from_secs(10));
        for (q_heads, output) in [(3, OutputMode::Replicated), (6, OutputMode::Scattered)] {
            let desc = AttentionDesc { output, ..shape(q_heads, 3, 64, Dtype::F16) };
            let case = Case::plain(over_nccl(desc), world, &[(130, 3), (0, 1), (20, 1)], Values::Normal, 5);
            let [wanted, found] = QueryInput::ALL.map(|query_input| {
                let case = Case { desc: AttentionDesc { query_input, ..case.desc }, ..case.clone() };
                let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
                let mirrors = group.mirrors(&ranks);
                group.step(&plans, &mirrors, &mut ranks);
                let stats = plans[0].stats().unwrap();
                (ranks.iter().map(|rank| rank.bits(&case)).collect::<Vec<_>>(), stats)
            });
            assert!(wanted.0 == found.0, "{}", case.describe());
            let own = q_heads as u64 / world as u64;
            let more = (found.1.rounds - wanted.1.rounds, found.1.bytes_sent - wanted.1.bytes_sent);
            assert_eq!(more, (1, (world as u64 - 1) * 5 * own * 64 * case.desc.q_dtype.size() as u64));
        }
        let desc = AttentionDesc { query_input: QueryInput::Scattered, ..shape(6, 2, 64, Dtype::F16) };
        let added = AttentionDesc { algorithm: Algorithm::Allreduce3, ..desc };
        let error = Plan::create_all(&group.comms.iter().collect::<Vec<_>>(), &added).err().unwrap();
        assert!(error.message().starts_with("query_input: found SCATTERED"), "{error}");
    }
    if count() < 3 {
        return;
    }
    let config = CommConfig { node_groups: vec![1, 1, 2], ..CommConfig::default() };
    let group = Group::on(&[0, 1, 2], &config, 0);
    let desc =
        AttentionDesc { algorithm: Algorithm::Tree, query_input: QueryInput::Scattered, ..shape(6, 2, 64, Dtype::F16) };
    let error = Plan::create_all(&group.comms.iter().collect::<Vec<_>>(), &desc).err().unwrap();
    assert!(error.message().starts_with("query_input: found SCATTERED"), "{error}");
}

/// Partials of an engine's own, an empty one and a NaN among them.
pub fn merges() {
    let group = group(Duration::from_secs(10));
    let (world, heads, dim) = (group.comms.len(), 4usize, 64usize);
    let desc = AttentionDesc { kv_heads: 0, max_query_tokens: 3, out_dtype: Dtype::F32, ..shape(4, 4, 64, Dtype::F16) };
    let plans = group.plans(&over_nccl(desc));
    let tokens = 3;
    let rows = tokens * heads;
    // Row r of rank p: an lse that differs, o that is constant in a row.
    let lse = |rank: usize, row: usize| match row {
        1 => f32::NEG_INFINITY,
        2 if rank == 0 => f32::NEG_INFINITY,
        3 if rank == 1 => f32::NAN,
        _ => (rank as f32 - 0.5) * (row as f32 + 1.0),
    };
    let o =
        |rank: usize, row: usize| if lse(rank, row) == f32::NEG_INFINITY { f32::NAN } else { (rank * 10 + row) as f32 };
    let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let o_bytes = 4 * rows * dim;
    let buffers: Vec<Buffer> = (0..world)
        .map(|rank| {
            let all = (0..rows)
                .flat_map(|row| std::iter::repeat_n(o(rank, row), dim))
                .chain((0..rows).map(|row| lse(rank, row)));
            let buffer =
                Buffer::alloc(&group.gpus[rank].runtime, group.gpus[rank].device, 2 * (o_bytes + 4 * rows)).unwrap();
            buffer.upload(0, &bytes(all.collect())).unwrap();
            buffer
        })
        .collect();
    for (rank, buffer) in buffers.iter().enumerate() {
        let part = |at: usize, bytes: usize| Tensor {
            data: buffer.data().wrapping_byte_add(at),
            bytes: bytes as u64,
            stride: [0; 4],
        };
        let second = o_bytes + 4 * rows;
        let args = MergeArgs {
            query_tokens: tokens as i32,
            heads: 0,
            head_dim: 0,
            o: part(0, o_bytes),
            o_dtype: Dtype::F32,
            lse: part(o_bytes, 4 * rows),
            lse_base: 0,
            out: part(second, o_bytes),
            out_dtype: None,
            out_lse: part(second + o_bytes, 4 * rows),
            ..MergeArgs::default()
        };
        // SAFETY: the buffers outlive the step, which is waited for.
        unsafe { plans[rank].merge(&args, Some(&group.gpus[rank].stream)) }.unwrap();
    }
    for (gpu, buffer) in group.gpus.iter().zip(&buffers) {
        gpu.stream.synchronize().unwrap();
        let mut found = vec![0; o_bytes + 4 * rows];
        buffer.download(o_bytes + 4 * rows, &mut found).unwrap();
        let found: Vec<f32> = found.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        for row in 0..rows {
            let most = (0..world).map(|rank| f64::from(lse(rank, row))).fold(f64::NEG_INFINITY, f64::max);
            let weight = |rank: usize| (f64::from(lse(rank, row)) - most).exp();
            let live = (0..world).filter(|&rank| lse(rank, row) != f32::NEG_INFINITY);
            let sum: f64 = live.clone().map(weight).sum();
            let wanted: f64 = live.map(|rank| weight(rank) * f64::from(o(rank, row))).sum::<f64>() / sum;
            let (got, got_lse) = (f64::from(found[row * dim + 7]), f64::from(found[rows * dim + row]));
            match row {
                1 => assert_eq!((got, got_lse), (0.0, f64::NEG_INFINITY)),
                3 => assert!(got.is_nan() && got_lse.is_nan(), "{got} {got_lse}"),
                _ => {
                    assert!((got - wanted).abs() < 1e-5 * (1.0 + wanted.abs()), "row {row}: {got}, wanted {wanted}");
                    assert!((got_lse - most - sum.ln()).abs() < 1e-5 * (1.0 + most.abs()), "row {row}: {got_lse}");
                }
            }
        }
    }
}

/// Ranks that NCCL connected, on threads of their own.
pub fn over_an_id() {
    let world = count() as usize;
    let runtime = runtime();
    let id = Communicator::nccl_unique_id(&runtime).unwrap();
    let desc = over_nccl(shape(8, 2, 128, Dtype::Bf16));
    let case = Case::plain(desc, world, &[(200, 2), (3, 1)], Values::Normal, 8);
    let ranks: Vec<Rank> = std::thread::scope(|scope| {
        let (runtime, id, case) = (&runtime, &id, &case);
        let rank = move |rank: usize| {
            let (gpu, mut memory) = (Gpu::numbered(runtime, rank as i32), Rank::new(case, rank));
            // Before there is a step that another rank may begin: allocating may wait for its kernel.
            let mirror = Mirror::new(&gpu, &memory);
            let node_group = nodes().map_or(0, |nodes| 1 + rank as i32 % nodes);
            let config = CommConfig { node_group, ..CommConfig::default() };
            let comm = Communicator::create_nccl(runtime, id, world as i32, rank as i32, gpu.device, &config).unwrap();
            let plan = Plan::create(&comm, &case.desc).unwrap();
            for _ in 0..3 {
                mirror.decode(&gpu, &plan, &mut memory).unwrap();
            }
            assert!(comm.status().unwrap().error.is_none());
            memory
        };
        let threads: Vec<_> = (0..world).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(judge(&case, &ranks).unwrap().failure, None);
}

/// Threads create communicators over NCCL while another thread runs steps of a group on the same GPUs: neither delays the
/// other beyond its deadline.
pub fn created_beside_steps() {
    let rounds = if crate::support::full() { 30 } else { 3 };
    let world = count() as usize;
    let group = Group::new(world, Duration::from_secs(10));
    let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    let case = Case::plain(desc, world, &[(300, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    let is_over = AtomicBool::new(false);
    let steps = std::thread::scope(|scope| {
        let stepping = scope.spawn(|| {
            let mut steps = 0;
            while !is_over.load(Ordering::Relaxed) {
                group.step(&plans, &mirrors, &mut all);
                steps += 1;
            }
            steps
        });
        let created = std::panic::catch_unwind(|| (0..rounds).for_each(|_| over_an_id()));
        is_over.store(true, Ordering::Relaxed);
        let steps = stepping.join();
        created.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        steps.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    println!("{rounds} communicators created, {steps} steps meanwhile");
    assert!(group.comms.iter().all(|comm| comm.status().unwrap().error.is_none()));
    assert_eq!(judge(&case, &all).unwrap().failure, None);
}

/// Captured on every GPU by one thread, replayed over other lengths.
pub fn replays() {
    let group = group(Duration::from_secs(10));
    let world = group.comms.len();
    let desc = over_nccl(AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) });
    let case = Case::plain(desc, world, &[(400, 1), (90, 1)], Values::Normal, 5);
    let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&ranks);
    let replays: Vec<_> = (0..world)
        .map(|rank| {
            let current = Current::new(group.gpus[rank].device.ordinal);
            let raw = RawStream::new();
            let gpu = &group.gpus[rank];
            // SAFETY: the raw stream outlives the wrapped one, which is gone after the capture.
            let stream = unsafe { Stream::wrap_cuda(&gpu.runtime, gpu.device, raw.pointer()) }.unwrap();
            let graph = raw.capture(|| {
                // SAFETY: the device memory outlives the replays, which are waited for.
                unsafe { plans[rank].decode(&mirrors[rank].args, Some(&stream)) }.unwrap();
            });
            (graph, raw, current)
        })
        .collect();
    for lengths in [[400, 90], [17, 0], [1, 1], [0, 90]] {
        for (r, rank) in ranks.iter_mut().enumerate() {
            for (b, &length) in lengths.iter().enumerate() {
                let held = case.sequences[b].held[r].iter().filter(|&&position| position < length as usize).count();
                rank.set(Ints::KvLength, b, held as i32);
            }
            rank.prefill(0xff);
            mirrors[r].update_all(rank);
        }
        group.step(&plans, &mirrors, &mut ranks);
        let eager: Vec<_> = ranks.iter().map(|rank| rank.bits(&case)).collect();
        for _ in 0..3 {
            for (mirror, rank) in mirrors.iter().zip(&mut ranks) {
                rank.prefill(0xff);
                mirror.update_all(rank);
            }
            replays.iter().for_each(|(graph, raw, _)| graph.replay(raw));
            replays.iter().for_each(|(_, raw, _)| raw.synchronize());
            mirrors.iter().zip(&mut ranks).for_each(|(mirror, rank)| mirror.fetch(rank));
            let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(&case)).collect();
            assert!(bits == eager, "{lengths:?}: other bits in a replay");
        }
    }
    // In reverse: contexts are a stack.
    replays.into_iter().rev().for_each(drop);
}

/// The outputs of steps of all shapes that differ by route, as one number.
fn bits_of_steps(on: usize) -> u64 {
    let group = Group::new(on, Duration::from_secs(10));
    let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    let shapes = [
        base,
        AttentionDesc { output: OutputMode::Scattered, ..base },
        AttentionDesc { wire_dtype: Dtype::F16, out_dtype: Dtype::F16, ..base },
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (i, desc) in shapes.into_iter().enumerate() {
        let case = Case::plain(desc, on, &[(300, 1), (0, 1), (90, 3)], Values::Normal, 40 + i as u64);
        let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&ranks);
        group.step(&plans, &mirrors, &mut ranks);
        assert_eq!(judge(&case, &ranks).unwrap().failure, None);
        let mut take = |word: u32| hash = (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3);
        ranks.iter().for_each(|rank| rank.bits(&case).into_iter().for_each(&mut take));
    }
    hash
}

/// Says what bits came out, for the next.
pub fn bits() {
    println!("bits {:016x}", bits_of_steps(2));
}

/// Steps over NCCL come to the bits of steps over windows.
pub fn bits_of_windows() {
    let wanted = format!("bits {:016x}", bits_of_steps(2));
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.env("TREEATTN_TEST_ALONE", "nccl_gather_bits").env("TREEATTN_GPU_EXCHANGE", "nccl");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains(&wanted), "{said}, wanted {wanted}");
}

/// What a communicator and a plan say of the route, and what the route does not serve.
pub fn is_told() {
    let group = Group::new(2, Duration::from_secs(10));
    let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    let text = group.comms[0].describe().unwrap();
    assert!(text.contains(r#"{"name":"ONE_SHOT","by":"nccl","allgathers":1}"#), "{text}");
    let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&desc));
    let mirrors = group.mirrors(&all);
    for step in 1..=3 {
        group.step(&plans, &mirrors, &mut all);
        let stats = plans[1].stats().unwrap();
        assert_eq!((stats.algorithm, stats.rounds, stats.messages), (Algorithm::OneShot, step, step));
        // Rows of 64 f32, and of 16 bytes for the log-sum-exp.
        assert_eq!(stats.bytes_sent, step * 8 * (64 * 4 + 16));
        let why = if gathers() { "TREEATTN_GPU_EXCHANGE is nccl" } else { "reach each other's memory" };
        assert!(stats.reason.starts_with("one allgather of NCCL: ") && stats.reason.contains(why), "{}", stats.reason);
        let messages = 3 * (64 + case.desc.max_query_tokens as u64 * 8 * (64 * 4 + 16));
        assert!((messages..messages + 1024).contains(&stats.exchange_memory), "{messages}, {stats:?}");
    }
    let comms: Vec<_> = group.comms.iter().collect();
    let error = Plan::create_all(&comms, &AttentionDesc { checked: true, ..desc }).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("flags: found CHECKED"), "{error}");
    let two_shots = Plan::create_all(&comms, &AttentionDesc { algorithm: Algorithm::TwoShot, ..desc });
    // Windows are there where it was only asked for the other way.
    assert_eq!(two_shots.is_ok(), gathers());
}

/// Two ranks on a GPU have no NCCL between them: said with why there are no windows.
pub fn shared_gpus_are_refused() {
    let runtime = runtime();
    let gpu = Gpu::numbered(&runtime, 0);
    let comms = Communicator::create_local(&runtime, &[gpu.device; 2], &CommConfig::default()).unwrap();
    let desc = shape(8, 2, 64, Dtype::F16);
    let error = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    for text in ["TREEATTN_GPU_EXCHANGE is nccl", "cuda:0 on ranks 0 and 1"] {
        assert!(error.message().contains(text), "{error}");
    }
}
