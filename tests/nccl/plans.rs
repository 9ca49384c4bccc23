//! Plans over NCCL: what ranks agree on, and allreduces.

use std::time::{Duration, Instant};

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::{Buffer, CommConfig, Communicator, MergeArgs, Plan, Stream};
use treeattn::{Error, ErrorKind};

use crate::stand_in::{Mode, mode};
use crate::{HANG, SOON, config, error, gpu, group, on_ranks, runtime, shape};

pub fn plans_of_different_shapes_are_a_mismatch() {
    let comms = group(2, &config(HANG));
    let plan = |rank: i32| {
        let dim = if rank == 0 { 64 } else { 128 };
        // The fields take more than one message.
        Plan::create(&comms[rank as usize], &AttentionDesc { head_dim_qk: dim, head_dim_v: dim, ..shape() })
    };
    for error in on_ranks(2, plan).into_iter().map(error) {
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.message().starts_with("head_dim_qk: found 64 on ranks [0] and 128 on ranks [1]"), "{error}");
    }
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &shape()).unwrap());
    assert_eq!(plans[1].stats().unwrap().rank, 1);
}

pub fn a_peer_that_does_not_plan_is_a_timeout() {
    let comms = group(2, &config(Duration::from_secs(2)));
    let started = Instant::now();
    let found = error(Plan::create(&comms[0], &shape()));
    assert!(started.elapsed() < HANG);
    assert_eq!(found.kind(), ErrorKind::Timeout);
    assert!(found.message().contains("did not come within "), "{found}");
    let status = comms[0].status().unwrap();
    assert_eq!(status.error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    assert_eq!(error(Plan::create(&comms[0], &shape())).kind(), ErrorKind::Timeout, "broken for good");
}

pub fn an_abort_ends_a_wait() {
    let comms = group(2, &config(HANG));
    let found = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| error(Plan::create(&comms[0], &shape())));
        std::thread::sleep(SOON);
        comms[0].abort().unwrap();
        waiting.join().unwrap()
    });
    assert_eq!((found.kind(), found.rank()), (ErrorKind::Aborted, Some(0)));
}

pub fn leaving_does_not_wait_for_peers() {
    let comms = group(2, &config(HANG));
    mode(Mode::FinalizeHangs);
    let started = Instant::now();
    drop(comms);
    assert!(started.elapsed() < HANG);
}

fn by_allreduces() -> AttentionDesc {
    AttentionDesc { kv_heads: 0, output: OutputMode::Replicated, algorithm: Algorithm::Allreduce3, ..shape() }
}

/// Enqueues a merge of this rank's partial; the kernels do nothing here, but the allreduces do.
fn merge(plan: &Plan, rank: i32) -> Result<(), Error> {
    let runtime = runtime();
    let (stream, bytes) =
        (Stream::new(&runtime, gpu(rank)).unwrap(), Buffer::alloc(&runtime, gpu(rank), 16384).unwrap());
    let part = |at: usize| Tensor { data: bytes.data().wrapping_byte_add(at), bytes: 4096, stride: [0; 4] };
    let args = MergeArgs {
        query_tokens: 1,
        heads: 8,
        head_dim: 64,
        o: part(0),
        o_dtype: Dtype::F32,
        lse: part(4096),
        lse_base: 0,
        out: part(8192),
        out_dtype: None,
        out_lse: part(12288),
        ..MergeArgs::default()
    };
    // SAFETY: the buffer outlives the step, which is waited for.
    unsafe { plan.merge(&args, Some(&stream)) }?;
    stream.synchronize()
}

pub fn local_ranks_connect_for_allreduces() {
    let devices = [gpu(1), gpu(0)];
    let comms = Communicator::create_local(&runtime(), &devices, &config(HANG)).unwrap();
    // From one thread, then from one a rank, over the same connection.
    let mut plans = Plan::create_all(&[&comms[0], &comms[1]], &by_allreduces()).unwrap();
    plans.extend(on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap()));
    for pair in plans.chunks(2) {
        for step in 1..=3 {
            on_ranks(2, |rank| merge(&pair[rank as usize], 1 - rank).unwrap());
            let stats = pair[0].stats().unwrap();
            assert_eq!((stats.algorithm, stats.steps, stats.rounds), (Algorithm::Allreduce3, step, 3 * step));
            // 8 rows of 64, their lse, their weights, and two words a rank.
            assert_eq!(stats.bytes_sent, step * 4 * (8 * 64 + 8 + 8 + 4));
        }
    }
    // Each rank on a thread of its own from the start.
    let comms = Communicator::create_local(&runtime(), &devices, &config(HANG)).unwrap();
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap());
    on_ranks(2, |rank| merge(&plans[rank as usize], 1 - rank).unwrap());
    // Ranks that NCCL connected in the first place.
    let comms = group(2, &config(HANG));
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap());
    on_ranks(2, |rank| merge(&plans[rank as usize], rank).unwrap());
    // One that waits alone.
    let started = Instant::now();
    let found = error(merge(&plans[0], 0));
    assert_eq!(found.kind(), ErrorKind::Timeout);
    assert!(started.elapsed() < HANG);
    assert_eq!(comms[0].status().unwrap().error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    assert_eq!(error(merge(&plans[0], 0)).kind(), ErrorKind::Timeout, "broken for good");
}

pub fn allreduces_that_cannot_be_are_explained() {
    let none = CommConfig { nccl_path: Some("/nowhere/libnccl.so.2".into()), ..config(HANG) };
    let cases = [
        ([gpu(0), gpu(1)], none, ErrorKind::Unavailable, "/nowhere/libnccl.so.2"),
        ([gpu(1), gpu(1)], config(HANG), ErrorKind::Unsupported, "cuda:1 on ranks 0 and 1"),
    ];
    for (devices, config, kind, text) in cases {
        let comms = Communicator::create_local(&runtime(), &devices, &config).unwrap();
        let mut errors = on_ranks(2, |rank| error(Plan::create(&comms[rank as usize], &by_allreduces())));
        errors.push(error(Plan::create_all(&[&comms[0], &comms[1]], &by_allreduces())));
        for error in errors {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.message().contains(text), "{error}");
        }
    }
    let comms = Communicator::create_local(&runtime(), &[gpu(0), gpu(1)], &config(HANG)).unwrap();
    let narrow = AttentionDesc { wire_dtype: Dtype::Bf16, ..by_allreduces() };
    let error = error(Plan::create_all(&[&comms[0], &comms[1]], &narrow));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("wire_dtype: found bf16"), "{error}");
}
