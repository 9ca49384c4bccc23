//! Ranks over an engine's transport: here a mesh of sockets between threads. What happens when ranks fail, also between
//! processes, is in tests/faults.

#[path = "support/mesh.rs"]
mod mesh;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, OutputMode, Tensor};
use treeattn::runtime::{
    CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream, Transport,
};
use treeattn::{ErrorKind, Result};

use mesh::{FAIL, LONG, Mesh, connect, connect_as, unix_pairs};

const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

fn shape(tokens: i32) -> AttentionDesc {
    AttentionDesc { max_batch: tokens, max_query_tokens: tokens, ..AttentionDesc::new(4, 2, 16, 64) }
}

fn config(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, setup_timeout: LONG, threads_per_rank: 1, ..CommConfig::default() }
}

/// Decodes `batch` sequences of pseudo-random shards, the same for the same rank.
fn decode(plan: &Plan, rank: usize, batch: usize, stream: Option<&Stream>) -> Result<(Vec<f32>, Vec<f32>)> {
    let desc = *plan.desc();
    let mut state = 77 * rank as u32 + 1;
    let mut draw = |n: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    };
    let cache = batch * desc.max_kv_length as usize * (desc.kv_heads * desc.head_dim_v) as usize;
    let (k, v) = (draw(cache), draw(cache));
    let q: Vec<f32> = (0..batch * 64).map(|i| (i % 7) as f32 / 7.0).collect();
    let length = vec![9; batch];
    let (mut out, mut lse) = (vec![7.0f32; batch * plan.heads().len() * 16], vec![7.0; batch * plan.heads().len()]);
    let args = DecodeArgs {
        batch: batch as i32,
        query_tokens: batch as i32,
        q: Tensor::from_slice(&q),
        k: Tensor::from_slice(&k),
        v: Tensor::from_slice(&v),
        out: Tensor::from_slice_mut(&mut out),
        lse: Tensor::from_slice_mut(&mut lse),
        kv_length: length.as_ptr(),
        ..DecodeArgs::default()
    };
    // SAFETY: every buffer outlives the step, which is waited for.
    unsafe { plan.decode(&args, stream)? };
    if let Some(stream) = stream {
        stream.synchronize()?;
    }
    Ok((out, lse))
}

fn on_ranks<T: Send>(world: usize, config: &CommConfig, run: impl Fn(&Mesh, &Communicator) -> T + Sync) -> Vec<T> {
    let began = Instant::now();
    let meshes = Mesh::threads(world, unix_pairs);
    let results = thread::scope(|scope| {
        let threads: Vec<_> = meshes
            .iter()
            .map(|mesh| {
                let run = &run;
                scope.spawn(move || run(mesh, &connect(mesh, config).unwrap()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(began.elapsed() < 3 * LONG);
    results
}

/// What the ranks of a local group give, rank by rank, as nodes of these groups.
fn in_one_process(desc: &AttentionDesc, groups: &[i32], tokens: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { node_groups: groups.to_vec(), ..config(LONG) };
    let comms = Communicator::create_local(&runtime, &vec![CPU; groups.len()], &config).unwrap();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), desc).unwrap();
    thread::scope(|scope| {
        let ranks = plans.iter().enumerate();
        let threads: Vec<_> =
            ranks.map(|(r, plan)| scope.spawn(move || decode(plan, r, tokens, None).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_algorithm_gives_the_bits_of_a_local_group_over_any_nodes() {
    let mut state = 5u64;
    let mut draw = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let full = std::env::var("TREEATTN_TEST").is_ok_and(|word| word == "full");
    let worlds: &[usize] = if full { &[2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 24, 33] } else { &[2, 3, 5, 8, 13] };
    for &world in worlds {
        for algorithm in ALGORITHMS {
            // Group 0 would be the machine, on all ranks.
            let kinds = 1 + draw(world);
            let groups: Vec<i32> = (0..world).map(|_| 1 + draw(kinds) as i32).collect();
            let tokens = [1, 2, 300][draw(3)];
            let output = [OutputMode::Replicated, OutputMode::Scattered][draw(2)];
            let desc = AttentionDesc { output, algorithm, ..shape(tokens as i32) };
            let wanted = in_one_process(&desc, &groups, tokens);
            let meshes = Mesh::threads(world, unix_pairs);
            let found: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = meshes
                    .iter()
                    .map(|mesh| {
                        let config = CommConfig { node_group: groups[mesh.rank], ..config(LONG) };
                        let desc = &desc;
                        scope.spawn(move || {
                            let plan = Plan::create(&connect(mesh, &config).unwrap(), desc).unwrap();
                            assert_eq!(plan.stats().unwrap().algorithm, algorithm);
                            decode(&plan, mesh.rank, tokens, None).unwrap()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(found, wanted, "{algorithm:?}, groups {groups:?}, {tokens} tokens, {output:?}");
        }
    }
}

#[test]
fn a_transport_gives_the_bits_of_a_local_group() {
    // 1 token travels with the header; 300 tokens need a second message, and 4,000 several chunks.
    for (world, tokens) in [(1, 1), (2, 1), (3, 300), (5, 2), (2, 5000)] {
        for output in [OutputMode::Replicated, OutputMode::Scattered] {
            let desc = AttentionDesc { output, ..shape(tokens) };
            let wanted = in_one_process(&desc, &vec![0; world], tokens as usize);
            let found = on_ranks(world, &config(LONG), |mesh, comm| {
                let plan = Plan::create(comm, &desc).unwrap();
                let first = decode(&plan, mesh.rank, tokens as usize, None).unwrap();
                assert_eq!(first, decode(&plan, mesh.rank, tokens as usize, None).unwrap());
                assert_eq!(comm.status().unwrap().error, None);
                first
            });
            assert_eq!(found, wanted, "{world} ranks, {tokens} tokens, {output:?}");
        }
    }
}

#[test]
fn algorithms_that_need_sendrecv_say_so_where_there_is_none() {
    let meshes = Mesh::threads(2, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            scope.spawn(|| {
                let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
                let transport = Transport { sendrecv: None, ..mesh.transport(false) };
                let rank = mesh.rank as i32;
                // SAFETY: the mesh outlives the communicator.
                let comm =
                    unsafe { Communicator::create_from_transport(&runtime, transport, 2, rank, CPU, &config(LONG)) }
                        .unwrap();
                for algorithm in ALGORITHMS {
                    let made = Plan::create(&comm, &AttentionDesc { algorithm, ..shape(1) });
                    match algorithm {
                        Algorithm::Tree | Algorithm::Ring => {
                            let error = made.err().unwrap();
                            assert_eq!(error.kind(), ErrorKind::Unsupported);
                            let text = error.message();
                            assert!(text.starts_with("algorithm: found ") && text.contains("sendrecv"), "{error}");
                        }
                        _ => drop(decode(&made.unwrap(), mesh.rank, 1, None).unwrap()),
                    }
                }
            });
        }
    });
}

/// Every rank of a ring works out all partials, and slices of other sizes would round otherwise.
#[test]
fn a_ring_wants_equally_many_threads_on_every_rank() {
    let meshes = Mesh::threads(3, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            scope.spawn(move || {
                let config = CommConfig { threads_per_rank: if mesh.rank == 2 { 2 } else { 1 }, ..config(LONG) };
                let comm = connect(mesh, &config).unwrap();
                let desc = AttentionDesc { algorithm: Algorithm::Ring, ..shape(1) };
                let error = Plan::create(&comm, &desc).err().unwrap();
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(2)));
                assert!(error.message().starts_with("threads_per_rank: found 1 on ranks [0, 1] and 2"), "{error}");
                Plan::create(&comm, &AttentionDesc { algorithm: Algorithm::Tree, ..shape(1) }).unwrap();
            });
        }
    });
}

#[test]
fn ranks_that_differ_are_named() {
    for kind in [ErrorKind::Desync, ErrorKind::Mismatch] {
        let errors = on_ranks(3, &config(LONG), |mesh, comm| {
            let odd = mesh.rank == 2;
            if kind == ErrorKind::Mismatch {
                let desc = AttentionDesc { causal: odd, ..shape(4) };
                return Plan::create(comm, &desc).err().unwrap();
            }
            let plan = Plan::create(comm, &shape(4)).unwrap();
            decode(&plan, mesh.rank, if odd { 2 } else { 1 }, None).err().unwrap()
        });
        for error in errors {
            assert_eq!((error.kind(), error.rank()), (kind, Some(2)), "{error}");
        }
    }
}

#[test]
fn a_rank_that_never_comes_ends_the_step_by_its_deadline() {
    for deaf in [0, 1] {
        let step = Duration::from_millis(200);
        let outcomes = on_ranks(3, &config(step), |mesh, comm| {
            let plan = Plan::create(comm, &shape(1)).unwrap();
            if mesh.rank == 1 {
                thread::sleep(step * 8);
                return None;
            }
            mesh.deaf.store(deaf, Ordering::Relaxed);
            let began = Instant::now();
            let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
            let took = began.elapsed();
            assert_eq!(comm.status().unwrap().error.unwrap().kind(), error.kind());
            assert_eq!(decode(&plan, mesh.rank, 1, None).err().unwrap().kind(), error.kind());
            Some((error, took))
        });
        for (error, took) in outcomes.into_iter().flatten() {
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            assert!(took < step + Duration::from_secs(1), "{took:?}");
        }
    }
}

#[test]
fn abort_ends_a_callback() {
    on_ranks(2, &config(LONG), |mesh, comm| {
        let plan = Plan::create(comm, &shape(1)).unwrap();
        if mesh.rank == 0 {
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(Duration::from_millis(100));
                    comm.abort().unwrap();
                });
                let error = decode(&plan, 0, 1, None).err().unwrap();
                assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
            });
        } else {
            thread::sleep(Duration::from_millis(400));
        }
    });
}

#[test]
fn a_failing_callback_is_a_transport_error_and_the_process_goes_on() {
    for round in 0..20 {
        on_ranks(2, &config(LONG), |mesh, comm| {
            let plan = Plan::create(comm, &shape(1)).unwrap();
            for _ in 0..round {
                decode(&plan, mesh.rank, 1, None).unwrap();
            }
            mesh.fault.store(FAIL, Ordering::Relaxed);
            let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Transport, "{error}");
            assert!(error.message().contains("returned 4242"), "{error}");
        });
    }
}

#[test]
fn callbacks_run_on_stream_threads_only_where_allowed() {
    let meshes = Mesh::threads(1, unix_pairs);
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let stream = Stream::new(&runtime, CPU).unwrap();
    for allowed in [false, true] {
        let transport = meshes[0].transport(allowed);
        // SAFETY: the mesh outlives the communicator.
        let comm =
            unsafe { Communicator::create_from_transport(&runtime, transport, 1, 0, CPU, &config(LONG)) }.unwrap();
        let plan = Plan::create(&comm, &shape(1)).unwrap();
        let result = decode(&plan, 0, 1, Some(&stream));
        assert_eq!(result.is_ok(), allowed);
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.message().starts_with("stream:"), "{error}");
        }
    }
}

#[test]
fn ranks_out_of_order_are_refused() {
    let errors: Vec<_> = {
        let meshes = Mesh::threads(2, unix_pairs);
        thread::scope(|scope| {
            let threads: Vec<_> = meshes
                .iter()
                .map(|mesh| scope.spawn(|| connect_as(mesh, 1 - mesh.rank, &config(LONG)).err().unwrap()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::Mismatch), "{errors:?}");
}
