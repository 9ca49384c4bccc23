//! Ranks over an engine's transport: here a mesh of Unix sockets, between threads and between processes.

use std::ffi::c_void;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use treeattn::attention::{AttentionDesc, DecodeArgs, OutputMode, Tensor};
use treeattn::runtime::{
    CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream, Transport,
};
use treeattn::{ErrorKind, Result};

const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };
const LONG: Duration = Duration::from_secs(20);

/// One rank's sockets to all others.
struct Mesh {
    rank: usize,
    peers: Vec<Option<UnixStream>>,
    /// Told to fail with this code.
    fail: AtomicI32,
    /// Told to wait for the abort word alone, whatever the timeout.
    deaf: AtomicI32,
}

impl Mesh {
    fn threads(world: usize) -> Vec<Mesh> {
        let mut all: Vec<Vec<Option<UnixStream>>> = (0..world).map(|_| (0..world).map(|_| None).collect()).collect();
        for pair in (0..world).flat_map(|a| (a + 1..world).map(move |b| [a, b])) {
            let (x, y) = UnixStream::pair().unwrap();
            (all[pair[0]][pair[1]], all[pair[1]][pair[0]]) = (Some(x), Some(y));
        }
        all.into_iter().enumerate().map(|(rank, peers)| Mesh::new(rank, peers)).collect()
    }

    /// Rank `rank` of processes that meet in `folder`: it listens for higher ranks and calls lower ones.
    fn process(folder: &Path, rank: usize, world: usize) -> Mesh {
        let path = |rank: usize| folder.join(format!("rank{rank}"));
        let listener = UnixListener::bind(path(rank)).unwrap();
        let mut peers: Vec<Option<UnixStream>> = (0..world).map(|_| None).collect();
        for (peer, slot) in peers.iter_mut().enumerate().take(rank) {
            let until = Instant::now() + LONG;
            let mut stream = loop {
                match UnixStream::connect(path(peer)) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(Instant::now() < until, "rank {peer}: {error}"),
                }
                thread::sleep(Duration::from_millis(2));
            };
            stream.write_all(&[rank as u8]).unwrap();
            *slot = Some(stream);
        }
        for _ in rank + 1..world {
            let (mut stream, _) = listener.accept().unwrap();
            let mut who = [0];
            stream.read_exact(&mut who).unwrap();
            peers[who[0] as usize] = Some(stream);
        }
        Mesh::new(rank, peers)
    }

    fn new(rank: usize, peers: Vec<Option<UnixStream>>) -> Mesh {
        for peer in peers.iter().flatten() {
            peer.set_nonblocking(true).unwrap();
        }
        Mesh { rank, peers, fail: AtomicI32::new(0), deaf: AtomicI32::new(0) }
    }

    fn transport(&self, stream_threads: bool) -> Transport {
        Transport { ctx: (self as *const Mesh).cast_mut().cast(), allgather, sendrecv: None, stream_threads }
    }

    /// Sends to all and receives from all, whoever is ready.
    fn gather(&self, send: &[u8], recv: &mut [u8], give_up: impl Fn() -> bool) -> i32 {
        let n = send.len();
        recv[self.rank * n..][..n].copy_from_slice(send);
        let mut left: Vec<(usize, usize, usize)> =
            self.peers.iter().enumerate().filter(|(_, peer)| peer.is_some()).map(|(r, _)| (r, 0, 0)).collect();
        while left.iter().any(|&(_, sent, got)| sent < n || got < n) {
            let mut moved = false;
            for (rank, sent, got) in &mut left {
                let mut peer = self.peers[*rank].as_ref().unwrap();
                if *sent < n {
                    match peer.write(&send[*sent..]) {
                        Ok(0) => return 2,
                        Ok(more) => (*sent, moved) = (*sent + more, true),
                        Err(error) if error.kind() == IoKind::WouldBlock => {}
                        Err(_) => return 3,
                    }
                }
                if *got < n {
                    match peer.read(&mut recv[*rank * n + *got..(*rank + 1) * n]) {
                        Ok(0) => return 4,
                        Ok(more) => (*got, moved) = (*got + more, true),
                        Err(error) if error.kind() == IoKind::WouldBlock => {}
                        Err(_) => return 5,
                    }
                }
            }
            if !moved {
                if give_up() {
                    return 1;
                }
                thread::yield_now();
            }
        }
        0
    }
}

unsafe extern "C" fn allgather(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    timeout_ns: i64,
    abort: *const i32,
) -> i32 {
    // SAFETY: `ctx` is the mesh that made this transport, and outlives the communicator.
    let mesh = unsafe { &*ctx.cast::<Mesh>() };
    if mesh.fail.load(Ordering::Relaxed) != 0 {
        return mesh.fail.load(Ordering::Relaxed);
    }
    let until = Instant::now() + Duration::from_nanos(timeout_ns as u64);
    // SAFETY: sizes as the library says; the abort word is read as the atomic that it is.
    let (send, recv, abort) = unsafe {
        (
            std::slice::from_raw_parts(send.cast::<u8>(), bytes),
            std::slice::from_raw_parts_mut(recv.cast::<u8>(), bytes * mesh.peers.len()),
            AtomicI32::from_ptr(abort.cast_mut()),
        )
    };
    let deaf = mesh.deaf.load(Ordering::Relaxed) != 0;
    mesh.gather(send, recv, || abort.load(Ordering::Acquire) != 0 || (!deaf && Instant::now() >= until))
}

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

fn connect(mesh: &Mesh, config: &CommConfig) -> Result<Communicator> {
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let (world, rank) = (mesh.peers.len() as i32, mesh.rank as i32);
    // SAFETY: the mesh outlives the communicator.
    unsafe { Communicator::create_from_transport(&runtime, mesh.transport(false), world, rank, CPU, config) }
}

fn on_ranks<T: Send>(world: usize, config: &CommConfig, run: impl Fn(&Mesh, &Communicator) -> T + Sync) -> Vec<T> {
    let began = Instant::now();
    let meshes = Mesh::threads(world);
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

#[test]
fn a_transport_gives_the_bits_of_a_local_group() {
    // 1 token travels with the header; 300 tokens need a second message, and 4,000 several chunks.
    for (world, tokens) in [(1, 1), (2, 1), (3, 300), (5, 2), (2, 5000)] {
        for output in [OutputMode::Replicated, OutputMode::Scattered] {
            let desc = AttentionDesc { output, ..shape(tokens) };
            let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
            let comms = Communicator::create_local(&runtime, &vec![CPU; world], &config(LONG)).unwrap();
            let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
            let wanted: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = plans
                    .iter()
                    .enumerate()
                    .map(|(r, plan)| scope.spawn(move || decode(plan, r, tokens as usize, None).unwrap()))
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
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
            mesh.fail.store(42, Ordering::Relaxed);
            let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Transport, "{error}");
            assert!(error.message().contains("returned 42"), "{error}");
        });
    }
}

#[test]
fn callbacks_run_on_stream_threads_only_where_allowed() {
    let meshes = Mesh::threads(1);
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
        let meshes = Mesh::threads(2);
        thread::scope(|scope| {
            let threads: Vec<_> = meshes
                .iter()
                .map(|mesh| {
                    scope.spawn(|| {
                        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
                        let rank = 1 - mesh.rank as i32;
                        let transport = mesh.transport(false);
                        // SAFETY: the mesh outlives the communicator.
                        unsafe { Communicator::create_from_transport(&runtime, transport, 2, rank, CPU, &config(LONG)) }
                            .err()
                            .unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::Mismatch), "{errors:?}");
}

/// What a rank of a process test says of its end.
const CHILD: &str = "TREEATTN_TEST_TRANSPORT_RANK";

/// Not a test of its own: the other processes of `a_killed_process_is_noticed`.
#[test]
fn child() {
    let Ok(words) = std::env::var(CHILD) else { return };
    let words: Vec<&str> = words.split(' ').collect();
    let (folder, rank, world): (_, usize, usize) =
        (PathBuf::from(words[0]), words[1].parse().unwrap(), words[2].parse().unwrap());
    let mesh = Mesh::process(&folder, rank, world);
    let comm = connect(&mesh, &config(Duration::from_millis(500))).unwrap();
    let plan = Plan::create(&comm, &shape(1)).unwrap();
    let wanted = decode(&plan, rank, 1, None).unwrap();
    std::fs::write(folder.join(format!("ready{rank}")), "").unwrap();
    for _ in 0..2_000_000 {
        let began = Instant::now();
        match decode(&plan, rank, 1, None) {
            Ok(found) => assert_eq!(found, wanted),
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Transport | ErrorKind::Timeout), "{error}");
                assert!(began.elapsed() < Duration::from_millis(1600), "{:?}", began.elapsed());
                // A fresh communicator works in the same process.
                let alone = Mesh::threads(1);
                let comm = connect(&alone[0], &config(LONG)).unwrap();
                decode(&Plan::create(&comm, &shape(1)).unwrap(), 0, 1, None).unwrap();
                std::fs::write(folder.join(format!("survived{rank}")), "").unwrap();
                return;
            }
        }
    }
    panic!("nobody was killed");
}

#[test]
fn a_killed_process_is_noticed() {
    let kills = if std::env::var("TREEATTN_TEST").as_deref() == Ok("full") { 100 } else { 6 };
    for kill in 0..kills {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mesh{}-{kill}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let world = 3;
        let mut ranks: Vec<Child> = (0..world)
            .map(|rank| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "child", "--nocapture"])
                    .env(CHILD, format!("{} {rank} {world}", folder.display()))
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let until = Instant::now() + LONG;
        while !(0..world).all(|rank| folder.join(format!("ready{rank}")).exists()) {
            assert!(Instant::now() < until, "the ranks did not start");
            thread::sleep(Duration::from_millis(2));
        }
        thread::sleep(Duration::from_millis(7 * kill as u64 % 50));
        let victim = kill % world;
        ranks[victim].kill().unwrap();
        for (rank, child) in ranks.iter_mut().enumerate() {
            let status = child.wait().unwrap();
            assert_eq!(status.success(), rank != victim, "rank {rank}: {status}");
            assert_eq!(folder.join(format!("survived{rank}")).exists(), rank != victim);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
