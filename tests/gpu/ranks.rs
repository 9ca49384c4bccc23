//! Ranks on GPUs that exchange through each other's memory: several on one GPU, and over two where there are two.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::reference::Comparison;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode, Tensor};
use treeattn::runtime::{Buffer, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream};

use crate::driver::{Current, RawStream};
use crate::group::{Group, ranks};
use crate::numerics::{MOST, SELDOM, shape};
use crate::space;
use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::rng::Rng;
use crate::support::run::{judge, judge_with};
use crate::support::values::Values;
use crate::support::{full, only_case, seed};

/// Far more than anything here takes.
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
    let counts = counts();
    let mut groups: HashMap<(usize, usize), Group> = HashMap::new();
    let mut by_dtype: [Comparison; 3] = Default::default();
    let seeds = only_case().map_or_else(
        || (first..first + count).map(|index| Rng::derive(seed() ^ 0x77, 3 * index + layout as u64)).collect(),
        |case| vec![case],
    );
    let mut failures = Vec::new();
    for (n, case) in seeds.into_iter().enumerate() {
        let case = space::sharded(case, layout);
        if std::env::var_os("TREEATTN_TRACE").is_some() {
            eprintln!("{}", case.describe());
        }
        let on = counts[n % counts.len()];
        let group = groups.entry((case.world, on)).or_insert_with(|| Group::over(case.world, on, LONG));
        match run(group, &case) {
            Ok(found) if case.desc.wire_dtype == Dtype::F32 => by_dtype[case.desc.out_dtype as usize - 1].add(&found),
            Ok(_) => {}
            Err(what) => failures.push(format!(
                "{what}\nover {on} GPUs: {}\nTREEATTN_CASE={} runs this case alone",
                case.describe(),
                case.seed
            )),
        }
    }
    let shown = failures[..failures.len().min(6)].join("\n");
    assert!(failures.is_empty(), "{} of {count} cases failed, among them\n{shown}", failures.len());
    for found in &by_dtype {
        assert!(found.broken as f64 <= SELDOM * found.elements as f64, "{found:?}");
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
    let found = judge_with(case, &ranks, (case.desc.v_dtype == Dtype::F16).then(|| 2f64.powi(-39)))?;
    match found.failure {
        Some(failure) if found.worst.max(found.worst_lse) > MOST => Err(failure),
        _ => Ok(found),
    }
}

fn close(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-4 * (1.0 + a.abs())
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

/// Partials of an engine's own, an empty one and a NaN among them, few and more than a slot holds.
pub fn merges() {
    for on in counts() {
        for (world, tokens) in [(2usize, 3usize), (3, 1), (5, 2), (2, 300)] {
            let group = Group::over(world, on, LONG);
            for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
                for output in [OutputMode::Replicated, OutputMode::Scattered] {
                    for wire_dtype in [Dtype::F32, Dtype::Bf16] {
                        let desc = AttentionDesc {
                            kv_heads: 0,
                            max_query_tokens: tokens as i32,
                            out_dtype: Dtype::F32,
                            algorithm,
                            output,
                            wire_dtype,
                            ..shape(8, 8, 128, Dtype::F16)
                        };
                        merge(&group, &desc, tokens);
                    }
                }
            }
        }
    }
}

fn merge(group: &Group, desc: &AttentionDesc, tokens: usize) {
    let (world, heads, dim) = (group.comms.len(), desc.q_heads as usize, desc.head_dim_v as usize);
    let (plans, rows) = (group.plans(desc), tokens * heads);
    // Row r of rank p: an lse that differs, o that is constant in a row.
    let lse = |rank: usize, row: usize| match row {
        1 => f32::NEG_INFINITY,
        2 if rank == 0 => f32::NEG_INFINITY,
        3 if rank == 1 => f32::NAN,
        _ => (rank as f32 - 0.5) * ((row % 7) as f32 + 1.0),
    };
    let o = |rank: usize, row: usize| {
        if lse(rank, row) == f32::NEG_INFINITY { f32::NAN } else { (rank * 8 + row % 16) as f32 }
    };
    let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let o_bytes = 4 * rows * dim;
    let second = o_bytes + 4 * rows;
    let buffers: Vec<Buffer> = (0..world)
        .map(|rank| {
            let o = (0..rows).flat_map(|row| std::iter::repeat_n(o(rank, row), dim));
            let all = o.chain((0..rows).map(|row| lse(rank, row)));
            let gpu = &group.gpus[rank];
            let buffer = Buffer::alloc(&gpu.runtime, gpu.device, 2 * second).unwrap();
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
        let own = plans[rank].heads().len();
        let args = MergeArgs {
            query_tokens: tokens as i32,
            heads: 0,
            head_dim: 0,
            o: part(0, o_bytes),
            o_dtype: Dtype::F32,
            lse: part(o_bytes, 4 * rows),
            lse_base: 0,
            plus_inf_is_empty: false,
            out: part(second, 4 * tokens * own * dim),
            out_dtype: None,
            out_lse: part(second + o_bytes, 4 * tokens * own),
        };
        // SAFETY: the buffers outlive the step, which is waited for.
        unsafe { plans[rank].merge(&args, Some(&group.gpus[rank].stream)) }.unwrap();
    }
    for (rank, (gpu, buffer)) in group.gpus.iter().zip(&buffers).enumerate() {
        gpu.stream.synchronize().unwrap();
        let mut found = vec![0; second];
        buffer.download(second, &mut found).unwrap();
        let found: Vec<f32> = found.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let own = plans[rank].heads();
        for (n, row) in (0..rows).filter(|row| own.contains(&(row % heads))).enumerate() {
            let most = (0..world).map(|rank| f64::from(lse(rank, row))).fold(f64::NEG_INFINITY, f64::max);
            let weight = |rank: usize| (f64::from(lse(rank, row)) - most).exp();
            let live = (0..world).filter(|&rank| lse(rank, row) != f32::NEG_INFINITY);
            let sum: f64 = live.clone().map(weight).sum();
            let wanted: f64 = live.map(|rank| weight(rank) * f64::from(o(rank, row))).sum::<f64>() / sum;
            let got_lse = found[rows * dim + n];
            for d in [0, 7, dim - 1] {
                let got = found[n * dim + d];
                match row {
                    1 => assert_eq!((got, got_lse), (0.0, f32::NEG_INFINITY)),
                    3 => assert!(got.is_nan() && got_lse.is_nan(), "{got} {got_lse}"),
                    _ => {
                        // Two shots take what was merged over the wire as well.
                        let slack = if desc.wire_dtype == Dtype::F32 { 1e-4 } else { 1e-2 } * (1.0 + wanted.abs());
                        assert!((f64::from(got) - wanted).abs() < slack, "row {row}: {got}, wanted {wanted}");
                        assert!(close(got_lse, (most + sum.ln()) as f32), "row {row}: {got_lse}");
                    }
                }
            }
        }
    }
    assert!(group.errors().into_iter().flatten().next().is_none());
}

/// A length out of range on one rank: NaN for that sequence and the same report on every rank, and nothing else.
pub fn bad_data() {
    for on in counts() {
        for (world, algorithm) in [(2, Algorithm::OneShot), (3, Algorithm::TwoShot)] {
            let group = Group::over(world, on, LONG);
            let desc = AttentionDesc { algorithm, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, world, &[(100, 1), (90, 1), (80, 1)], Values::Normal, 5);
            let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
            ranks[1].set(Ints::KvLength, 1, -3);
            let mirrors = group.mirrors(&ranks);
            group.step(&plans, &mirrors, &mut ranks);
            for (rank, comm) in ranks.iter().zip(&group.comms) {
                for head in 0..8 {
                    assert!(rank.row(&case, 1, head).0.iter().all(|x| x.is_nan()));
                    assert!(rank.lse_of(&case, 1, head).unwrap().is_nan());
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
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}

/// Steps of two plans in turn, many enqueued at once, across the wrap of epochs: the bits of the first step each.
pub fn many_steps() {
    let steps = if full() { 5000 } else { 40 };
    for on in counts() {
        for world in [2, 3] {
            // The probe takes the first epoch.
            let group = Group::starting_at(world, on, LONG, u32::MAX - 9);
            let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let cases = [
                Case::plain(desc, world, &[(60, 1)], Values::Normal, 5),
                Case::plain(
                    AttentionDesc { output: OutputMode::Scattered, ..desc },
                    world,
                    &[(20, 1), (33, 1)],
                    Values::Normal,
                    6,
                ),
            ];
            let mut all: Vec<Vec<Rank>> = cases.iter().map(ranks).collect();
            let plans: Vec<Vec<Plan>> = cases.iter().map(|case| group.plans(&case.desc)).collect();
            let mirrors: Vec<_> = all.iter().map(|ranks| group.mirrors(ranks)).collect();
            let mut wanted = Vec::new();
            for n in 0..2 {
                group.step(&plans[n], &mirrors[n], &mut all[n]);
                wanted.push(all[n].iter().map(|rank| rank.bits(&cases[n])).collect::<Vec<_>>());
            }
            assert_eq!(judge(&cases[0], &all[0]).unwrap().failure, None);
            for step in 0..steps {
                group.enqueue(&plans[step % 2], &mirrors[step % 2]);
            }
            for n in 0..2 {
                group.step(&plans[n], &mirrors[n], &mut all[n]);
                let bits: Vec<_> = all[n].iter().map(|rank| rank.bits(&cases[n])).collect();
                assert!(bits == wanted[n], "other bits after many steps");
            }
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}

/// Two communicators over the same GPUs, their steps enqueued in other orders on each rank.
pub fn two_communicators() {
    for on in counts() {
        let groups = [Group::over(2, on, LONG), Group::over(2, on, LONG)];
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(60, 1)], Values::Normal, 5);
        let mut all: Vec<Vec<Rank>> = groups.iter().map(|_| ranks(&case)).collect();
        let plans: Vec<Vec<Plan>> = groups.iter().map(|group| group.plans(&case.desc)).collect();
        let mirrors: Vec<_> = groups.iter().zip(&all).map(|(group, ranks)| group.mirrors(ranks)).collect();
        for step in 0..10 {
            for (rank, which) in [(0, step % 2), (1, (step + 1) % 2), (0, (step + 1) % 2), (1, step % 2)] {
                let (plan, mirror) = (&plans[which][rank], &mirrors[which][rank]);
                // SAFETY: the device memory outlives the step, which is waited for.
                unsafe { plan.decode(&mirror.args, Some(&groups[which].gpus[rank].stream)) }.unwrap();
            }
        }
        for ((group, ranks), (plans, mirrors)) in groups.iter().zip(&mut all).zip(plans.iter().zip(&mirrors)) {
            group.step(plans, mirrors, ranks);
            assert_eq!(judge(&case, ranks).unwrap().failure, None);
        }
    }
}

/// What is left of a group whose step failed: NaN, an error of `kind` that names `rank`, and a new group works.
fn failed(group: Group, case: &Case, all: &mut [Rank], survivors: &[usize], kind: ErrorKind, rank: i32) {
    for &survivor in survivors {
        let error = group.gpus[survivor].stream.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.rank()), (kind, Some(rank)), "{error}");
        let error = group.comms[survivor].status().unwrap().error.unwrap();
        assert_eq!((error.kind(), error.rank()), (kind, Some(rank)), "{error}");
    }
    let on = group.gpus.iter().map(|gpu| gpu.device.ordinal).max().unwrap() as usize + 1;
    drop(group);
    let group = Group::over(case.world, on, LONG);
    let (plans, mirrors) = (group.plans(&case.desc), group.mirrors(all));
    group.step(&plans, &mirrors, all);
    assert_eq!(judge(case, all).unwrap().failure, None);
}

/// A step that one rank does not take part in ends by the deadline, with NaN, and so do the steps behind it.
pub fn a_rank_that_does_not_come() {
    for on in counts() {
        for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
            let desc = AttentionDesc { algorithm, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, 3, &[(100, 1)], Values::Normal, 5);
            let group = Group::over(3, on, Duration::from_millis(500));
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            let started = Instant::now();
            for _ in 0..3 {
                for rank in [0, 2] {
                    // SAFETY: the device memory outlives the step, which is waited for.
                    unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
                }
            }
            for rank in [0, 2] {
                let error = group.gpus[rank].stream.synchronize().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Timeout);
                mirrors[rank].fetch(&mut all[rank]);
                assert!(all[rank].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
                assert!(all[rank].lse_of(&case, 0, 3).unwrap().is_nan());
            }
            assert!(started.elapsed() < HANG);
            // SAFETY: nothing is enqueued.
            let error = unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout);
            drop(plans);
            failed(group, &case, &mut all, &[0, 2], ErrorKind::Timeout, 1);
        }
    }
}

/// Ranks that take a step for another.
pub fn out_of_step() {
    for on in counts() {
        let desc = AttentionDesc { out_dtype: Dtype::F32, max_batch: 2, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 3, &[(100, 1), (30, 1)], Values::Normal, 5);
        let group = Group::over(3, on, LONG);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let others = group.plans(&case.desc);
        let mirrors = group.mirrors(&all);
        for rank in 0..3 {
            let plan = if rank == 1 { &others[rank] } else { &plans[rank] };
            // SAFETY: the device memory outlives the step, which is waited for.
            unsafe { plan.decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
        }
        drop((plans, others));
        failed(group, &case, &mut all, &[0, 1, 2], ErrorKind::Desync, 1);
    }
}

/// An abort from another thread ends a wait at once.
pub fn aborted() {
    for on in counts() {
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
        let group = Group::over(2, on, LONG);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        let started = Instant::now();
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                group.comms[1].abort().unwrap();
            });
            let error = group.gpus[0].stream.synchronize().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Aborted);
        });
        assert!(started.elapsed() < LONG);
        drop(plans);
        failed(group, &case, &mut all, &[0], ErrorKind::Aborted, 1);
    }
}

/// A rank that leaves while another has work in flight: what it had sent counts, what it did not is its loss.
pub fn leave() {
    let rounds = if full() { 200 } else { 5 };
    for on in counts() {
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
        for round in 0..rounds {
            let mut group = Group::over(2, on, LONG);
            let (mut all, mut plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.enqueue(&plans, &mirrors);
            if round % 2 == 0 {
                // A step that the one who leaves does not take part in.
                // SAFETY: the device memory outlives the step, which is waited for.
                unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
            }
            // First the communicator: giving back a plan's memory waits for all work of the GPU.
            group.comms.pop().unwrap().close();
            plans.pop();
            let ended = group.gpus[0].stream.synchronize();
            if round % 2 == 0 {
                let error = ended.unwrap_err();
                assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(1)), "{error}");
                continue;
            }
            ended.unwrap();
            group.gpus[1].stream.synchronize().unwrap();
            mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
            assert_eq!(judge(&case, &all).unwrap().failure, None);
        }
    }
}

/// Captured on every rank by one thread, replayed over other lengths.
pub fn replays() {
    for on in counts() {
        let world = 2;
        let group = Group::over(world, on, LONG);
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, world, &[(400, 1), (90, 1)], Values::Normal, 5);
        let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&ranks);
        let replays: Vec<_> = (0..world)
            .map(|rank| {
                let gpu = &group.gpus[rank];
                let current = Current::new(gpu.device.ordinal);
                let raw = RawStream::new();
                // SAFETY: the raw stream outlives the wrapped one, which is gone after the capture.
                let stream = unsafe { Stream::wrap_cuda(&gpu.runtime, gpu.device, raw.pointer()) }.unwrap();
                let graph = raw.capture(|| {
                    for _ in 0..3 {
                        // SAFETY: the device memory outlives the replays, which are waited for.
                        unsafe { plans[rank].decode(&mirrors[rank].args, Some(&stream)) }.unwrap();
                    }
                });
                (graph, raw, current)
            })
            .collect();
        let rounds = if full() { 1000 } else { 3 };
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
            for (mirror, rank) in mirrors.iter().zip(&mut ranks) {
                rank.prefill(0xff);
                mirror.update_all(rank);
            }
            for _ in 0..rounds {
                replays.iter().for_each(|(graph, raw, _)| graph.replay(raw));
            }
            replays.iter().for_each(|(_, raw, _)| raw.synchronize());
            mirrors.iter().zip(&mut ranks).for_each(|(mirror, rank)| mirror.fetch(rank));
            let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(&case)).collect();
            assert!(bits == eager, "{lengths:?}: other bits in a replay");
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
        // In reverse: contexts are a stack.
        replays.into_iter().rev().for_each(drop);
    }
}
