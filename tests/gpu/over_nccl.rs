//! Steps over NCCL, on as many GPUs as there are, up to four: `ALLREDUCE3` or, with `TREEATTN_GPU_EXCHANGE=nccl`, one allgather;
//! with `TREEATTN_TEST_NODES=2` four ranks that count as two nodes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Placement, Tensor};
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
    AttentionDesc { algorithm: if gathers() { Algorithm::Auto } else { Algorithm::Allreduce3 }, ..desc }
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

/// A length out of range on one rank: NaN for that sequence and the same report on every rank, and nothing else.
pub fn bad_data() {
    let group = group(Duration::from_secs(10));
    let world = group.comms.len();
    let desc = over_nccl(AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) });
    let case = Case::plain(desc, world, &[(100, 1), (90, 1), (80, 1)], Values::Normal, 5);
    let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
    ranks[1].set(Ints::KvLength, 1, -3);
    let mirrors = group.mirrors(&ranks);
    group.step(&plans, &mirrors, &mut ranks);
    for (rank, comm) in ranks.iter().zip(&group.comms) {
        for head in 0..8 {
            assert!(
                rank.row(&case, 1, head).0.iter().all(|x| x.is_nan()) && rank.lse_of(&case, 1, head).unwrap().is_nan()
            );
            assert!(rank.row(&case, 0, head).0.iter().all(|x| x.is_finite()));
        }
        let status = comm.status().unwrap();
        assert_eq!(status.error.map(|error| error.kind()), Some(ErrorKind::InvalidData));
        assert_eq!((status.rank, status.sequence), (1, 1));
        assert!(comm.status().unwrap().error.is_none(), "told once");
    }
    ranks[1].set(Ints::KvLength, 1, case.sequences[1].held[1].len() as i32);
    let mirrors = group.mirrors(&ranks);
    group.step(&plans, &mirrors, &mut ranks);
    assert_eq!(judge(&case, &ranks).unwrap().failure, None);
    assert!(group.comms.iter().all(|comm| comm.status().unwrap().error.is_none()));
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

/// A step that one rank does not take part in ends by the deadline, with NaN; a new group works.
pub fn a_rank_that_does_not_come() {
    let desc = over_nccl(AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) });
    const STEP: Duration = Duration::from_secs(3);
    let first = group(STEP);
    let case = Case::plain(desc, first.comms.len(), &[(100, 1)], Values::Normal, 5);
    let group = first;
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    group.step(&plans, &mirrors, &mut all);
    let started = Instant::now();
    all_but(1, &group, &plans, &mirrors);
    for rank in (0..all.len()).filter(|&rank| rank != 1) {
        assert_eq!(group.gpus[rank].stream.synchronize().unwrap_err().kind(), ErrorKind::Timeout);
        let took = started.elapsed();
        assert!(took >= STEP && took < 2 * STEP - STEP / 6, "{took:?}");
        mirrors[rank].fetch(&mut all[rank]);
        assert!(all[rank].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
    }
    for comm in &group.comms {
        assert_eq!(comm.status().unwrap().error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    }
    // SAFETY: nothing is enqueued.
    let error = unsafe { plans[1].decode(&mirrors[1].args, Some(&group.gpus[1].stream)) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    drop((plans, group));
    let group = self::group(Duration::from_secs(10));
    let plans = group.plans(&case.desc);
    group.step(&plans, &mirrors, &mut all);
    assert_eq!(judge(&case, &all).unwrap().failure, None);
}

/// Enqueues a step on all ranks but one.
fn all_but(absent: usize, group: &Group, plans: &[Plan], mirrors: &[Mirror]) {
    for rank in (0..plans.len()).filter(|&rank| rank != absent) {
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
    }
}

/// A rank that destroys its communicator, this one or its peer, ends the step long before the deadline.
pub fn a_rank_that_leaves() {
    let desc = over_nccl(AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) });
    for (leaver, kind) in [(1, ErrorKind::PeerLost), (0, ErrorKind::ParentDestroyed)] {
        let group = group(HANG);
        let case = Case::plain(desc, group.comms.len(), &[(100, 1)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        let started = Instant::now();
        all_but(1, &group, &plans, &mirrors);
        group.comms[leaver].close();
        let error = group.gpus[0].stream.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.rank()), (kind, Some(leaver as i32)), "{error}");
        assert!(started.elapsed() < HANG / 4, "{:?}", started.elapsed());
        mirrors[0].fetch(&mut all[0]);
        assert!(all[0].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
    }
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

/// Ranks that run different steps of the same size: the error names all of them, outputs are NaN, and the communicator breaks.
pub fn out_of_step() {
    let desc = AttentionDesc { out_dtype: Dtype::F32, max_kv_length: 100, ..shape(8, 2, 64, Dtype::F16) };
    let desc = over_nccl(AttentionDesc { max_batch: 2, max_query_tokens: 2, ..desc });
    for is_other_plan in [false, true] {
        let group = group(HANG);
        let world = group.comms.len();
        let case = Case::plain(desc, world, &[(100, 2)], Values::Normal, 5);
        let other = Case::plain(desc, world, &[(50, 1), (50, 1)], Values::Normal, 6);
        let (mut all, plans, second) = (ranks(&case), group.plans(&desc), group.plans(&desc));
        let (mirrors, odd) = (group.mirrors(&all), group.mirrors(&ranks(&other)));
        for rank in 0..world {
            let (plans, mirrors) = match (rank == 1, is_other_plan) {
                (true, true) => (&second, &mirrors),
                (true, false) => (&plans, &odd),
                (false, _) => (&plans, &mirrors),
            };
            // SAFETY: the device memory outlives the step, which is waited for.
            unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
        }
        for rank in 0..world {
            let error = group.gpus[rank].stream.synchronize().unwrap_err();
            // Of two ranks each takes the other for the odd one.
            let blamed = if world == 2 { 1 - rank as i32 } else { 1 };
            assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
            // A node says what its own ranks think of each other.
            let is_blamed = error.rank() == Some(blamed) || nodes().is_some() && matches!(error.rank(), Some(1 | 3));
            assert!(is_blamed, "rank {rank}: {error}");
            if rank != 1 {
                mirrors[rank].fetch(&mut all[rank]);
                assert!(all[rank].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
            }
            // SAFETY: refused.
            let error = unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
        }
    }
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

/// Ranks on nodes of any kind: the answer, the same bits on all ranks, the same again.
fn grouping(groups: &[i32], devices: &[i32]) {
    let config = CommConfig { node_groups: groups.to_vec(), ..CommConfig::default() };
    let group = Group::on(devices, &config, 0);
    let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(6, 2, 64, Dtype::F16) };
    let shapes = [
        base,
        AttentionDesc { output: OutputMode::Scattered, algorithm: Algorithm::Tree, ..base },
        AttentionDesc { wire_dtype: Dtype::Bf16, ..shape(4, 2, 128, Dtype::Bf16) },
    ];
    for (i, desc) in shapes.into_iter().enumerate() {
        let sequences = [(130, 3), (0, 1), (1, 1), (70, 1)];
        let case = Case::plain(desc, groups.len(), &sequences, Values::Normal, 60 + i as u64);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mut first = Vec::new();
        for fill in [0xff, 0x3c] {
            all.iter_mut().for_each(|rank| rank.prefill(fill));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            assert!(all.iter().all(|rank| rank.strays(&case, fill) == 0), "{groups:?}");
            let bits: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
            assert!(first.is_empty() || first == bits, "{groups:?}: other bits");
            let is_replicated = desc.output == OutputMode::Replicated;
            assert!(!is_replicated || bits.iter().all(|rank| *rank == bits[0]), "{groups:?}");
            first = bits;
        }
        assert_eq!(judge(&case, &all).unwrap().failure, None, "{groups:?}");
        assert!(group.errors().into_iter().flatten().next().is_none());
        let stats = plans[0].stats().unwrap();
        assert_eq!((stats.algorithm, stats.rounds), (Algorithm::Tree, 2 * 2), "within the node, and between nodes");
        assert!(stats.reason.contains(" nodes: windows within"), "{}", stats.reason);
    }
    let text = group.comms[0].describe().unwrap();
    assert!(text.contains(r#"{"name":"TREE","by":"windows and nccl","nodes":"#), "{text}");
}

/// Two nodes of two ranks on as many GPUs, or on two; with a GPU for each rank nodes of unequal size, too.
pub fn groupings() {
    for groups in [[0, 0, 1, 1], [0, 1, 0, 1], [7, 2, 2, 7]] {
        let devices: Vec<i32> = match count() {
            4 => (0..4).collect(),
            _ => groups.iter().map(|&group| i32::from(group != groups[0])).collect(),
        };
        grouping(&groups, &devices);
    }
    if count() == 4 {
        for groups in [&[0, 0, 1][..], &[0, 1, 0], &[0, 0, 0, 1], &[0, 1, 1, 2], &[2, 1, 0, 0]] {
            grouping(groups, &(0..groups.len() as i32).collect::<Vec<_>>());
        }
    }
}

/// A node for each rank is an allgather of all, whatever it is called; what needs windows of all ranks is refused.
pub fn nodes_of_one() {
    let config = CommConfig { node_groups: vec![3, 1], ..CommConfig::default() };
    let group = Group::on(&[0, 1], &config, 0);
    let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    for algorithm in [Algorithm::Auto, Algorithm::Tree, Algorithm::OneShot] {
        let case = Case::plain(AttentionDesc { algorithm, ..desc }, 2, &[(100, 1)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        assert_eq!(judge(&case, &all).unwrap().failure, None);
        let stats = plans[0].stats().unwrap();
        let name = if algorithm == Algorithm::Tree { Algorithm::Tree } else { Algorithm::OneShot };
        assert_eq!((stats.algorithm, stats.rounds), (name, 1));
        assert!(stats.reason.contains("a node for each rank"), "{}", stats.reason);
    }
    let comms: Vec<_> = group.comms.iter().collect();
    let refused = |desc: AttentionDesc| Plan::create_all(&comms, &desc).map(drop).unwrap_err();
    assert_eq!(refused(AttentionDesc { algorithm: Algorithm::TwoShot, ..desc }).kind(), ErrorKind::Unsupported);
    // Of one node there is no tree.
    let group = Group::new(2, HANG);
    let comms: Vec<_> = group.comms.iter().collect();
    let error = Plan::create_all(&comms, &AttentionDesc { algorithm: Algorithm::Tree, ..desc }).map(drop).unwrap_err();
    assert!(error.message().starts_with("algorithm: found TREE on GPUs of one node"), "{error}");
}
