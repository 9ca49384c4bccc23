//! Communicators and plans of one process: what they promise when ranks agree, differ, stay away or leave.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use treeattn::attention::{
    Algorithm, AttentionDesc, DecodeArgs, Dtype, OutputMode, Placement, QueryInput, Reproducibility, Tensor,
};
use treeattn::runtime::{
    CommConfig, Communicator, Device, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream, merge_partials,
};
use treeattn::{ErrorKind, Result};

const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };
/// No wait of these tests may come near this; it only guards against a hang.
const HANG: Duration = Duration::from_secs(60);

fn group(world: usize, config: &CommConfig) -> (Runtime, Vec<Communicator>) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let comms = Communicator::create_local(&runtime, &vec![CPU; world], config).unwrap();
    (runtime, comms)
}

fn quick(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, threads_per_rank: 1, ..CommConfig::default() }
}

/// A shard of pseudo-random values and room for the outputs of one rank.
struct Shard {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    length: Vec<i32>,
}

impl Shard {
    fn new(desc: &AttentionDesc, batch: usize, length: i32, seed: u32) -> Shard {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut draw = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        let (heads, kv, dim) = (desc.q_heads as usize, desc.kv_heads as usize, desc.head_dim_v as usize);
        let cache = batch * desc.max_kv_length as usize * kv * dim;
        let mut shard = Shard {
            q: Vec::new(),
            k: draw(cache),
            v: draw(cache),
            out: vec![7.0; batch * heads * dim],
            lse: vec![7.0; batch * heads],
            length: vec![length; batch],
        };
        // Queries are the same on every rank.
        state = 99;
        shard.q = (0..batch * heads * dim)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        shard
    }

    fn args(&mut self, batch: usize) -> DecodeArgs {
        DecodeArgs {
            batch: batch as i32,
            query_tokens: batch as i32,
            q: Tensor::from_slice(&self.q),
            k: Tensor::from_slice(&self.k),
            v: Tensor::from_slice(&self.v),
            out: Tensor::from_slice_mut(&mut self.out),
            lse: Tensor::from_slice_mut(&mut self.lse),
            kv_length: self.length.as_ptr(),
            ..DecodeArgs::default()
        }
    }
}

fn shape() -> AttentionDesc {
    AttentionDesc { max_batch: 4, max_query_tokens: 4, ..AttentionDesc::new(4, 2, 16, 64) }
}

/// Runs `rank` once a rank, each on a thread of its own, and gives what each returned.
fn on_threads<T: Send>(world: usize, rank: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let began = Instant::now();
    let results = thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = (0..world).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(began.elapsed() < HANG);
    results
}

fn decode_all(comms: &[Communicator], desc: &AttentionDesc, length: i32) -> Vec<Result<(Vec<f32>, Vec<f32>)>> {
    on_threads(comms.len(), |r| {
        let plan = Plan::create(&comms[r], desc)?;
        let mut shard = Shard::new(desc, 2, length, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plan.decode(&shard.args(2), None)? };
        Ok((shard.out, shard.lse))
    })
}

fn assert_works(world: usize) {
    let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
    let results = decode_all(&comms, &shape(), 5);
    let first = results[0].as_ref().unwrap();
    for result in &results {
        assert_eq!(result.as_ref().unwrap(), first);
    }
}

#[test]
fn one_thread_drives_four_ranks_on_streams() {
    let (runtime, comms) = group(4, &quick(Duration::from_secs(20)));
    let desc = shape();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let streams: Vec<_> = comms.iter().map(|_| Stream::new(&runtime, CPU).unwrap()).collect();
    let mut shards: Vec<_> = (0..4).map(|r| Shard::new(&desc, 3, 6, r)).collect();
    for _ in 0..50 {
        for ((plan, stream), shard) in plans.iter().zip(&streams).zip(&mut shards) {
            // SAFETY: the shards live until the streams are synchronised.
            unsafe { plan.decode(&shard.args(3), Some(stream)).unwrap() };
        }
    }
    for stream in &streams {
        stream.synchronize().unwrap();
    }
    for shard in &shards[1..] {
        assert_eq!(shard.out, shards[0].out);
        assert_eq!(shard.lse, shards[0].lse);
    }
    assert!(shards[0].lse.iter().all(|l| l.is_finite() && *l != 7.0));
    let stats = plans[2].stats().unwrap();
    assert_eq!((stats.steps, stats.rounds, stats.messages), (50, 50, 150));
    assert!(stats.bytes_sent >= 150 * (3 * 4 * 17 * 4));
}

#[test]
fn null_streams_from_one_thread_time_out_and_say_why() {
    let (_runtime, comms) = group(4, &quick(Duration::from_millis(100)));
    let desc = shape();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let mut shard = Shard::new(&desc, 1, 6, 0);
    // SAFETY: the shard outlives the blocking call.
    let error = unsafe { plans[0].decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("thread or a CPU stream each"), "{error}");
    assert!(error.rank().is_some_and(|rank| rank > 0), "{error}");
    assert!(shard.out[..64].iter().all(|x| x.is_nan()), "a failed step leaves NaN");
    assert_works(2);
}

#[test]
fn every_difference_of_descriptors_is_named_on_every_rank() {
    let (_runtime, comms) = group(3, &quick(Duration::from_secs(20)));
    let base = shape();
    let changes: Vec<(&str, AttentionDesc)> = vec![
        ("q_heads", AttentionDesc { q_heads: 8, ..base }),
        ("kv_heads", AttentionDesc { kv_heads: 4, ..base }),
        ("head_dim_qk", AttentionDesc { head_dim_qk: 24, ..base }),
        ("head_dim_v", AttentionDesc { head_dim_v: 24, ..base }),
        ("q_dtype", AttentionDesc { q_dtype: Dtype::F16, ..base }),
        ("k_dtype", AttentionDesc { k_dtype: Dtype::F16, ..base }),
        ("v_dtype", AttentionDesc { v_dtype: Dtype::Bf16, ..base }),
        ("out_dtype", AttentionDesc { out_dtype: Dtype::Bf16, ..base }),
        ("placement.kind", AttentionDesc { placement: Placement::Explicit, ..base }),
        ("max_batch", AttentionDesc { max_batch: 5, ..base }),
        ("max_query_tokens", AttentionDesc { max_query_tokens: 5, ..base }),
        ("max_kv_length", AttentionDesc { max_kv_length: 65, ..base }),
        ("scale", AttentionDesc { scale: 0.5, ..base }),
        ("causal", AttentionDesc { causal: true, ..base }),
        ("output", AttentionDesc { output: OutputMode::Scattered, ..base }),
        ("algorithm", AttentionDesc { algorithm: Algorithm::OneShot, ..base }),
        ("wire_dtype", AttentionDesc { wire_dtype: Dtype::Bf16, ..base }),
        ("kv_stable", AttentionDesc { kv_stable: true, ..base }),
    ];
    for (field, other) in changes {
        let errors = on_threads(3, |r| Plan::create(&comms[r], if r == 1 { &other } else { &base }).err().unwrap());
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{field}: {error}");
            assert!(error.message().starts_with(&format!("{field}:")), "{field}: {error}");
            assert!(error.message().contains("[1]") && error.message().contains("[0, 2]"), "{field}: {error}");
            assert_eq!(error.rank(), Some(1));
        }
    }
    // A mismatch leaves the communicator usable.
    assert!(decode_all(&comms, &base, 5).iter().all(Result::is_ok));
}

#[test]
fn a_rank_that_cannot_make_its_plan_tells_the_others() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let bad = AttentionDesc { reproducibility: Reproducibility::Canonical, ..shape() };
    let good = shape();
    let errors = on_threads(2, |r| Plan::create(&comms[r], if r == 1 { &bad } else { &good }).err().unwrap());
    assert_eq!(errors[0].kind(), ErrorKind::Mismatch);
    assert!(errors[0].message().contains("rank 1") && errors[0].message().contains("reproducibility"), "{}", errors[0]);
    assert_eq!(errors[1].kind(), ErrorKind::Unsupported);
}

#[test]
fn a_ring_has_no_partials_to_merge_and_goes_on() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let desc = AttentionDesc { algorithm: Algorithm::Ring, ..shape() };
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let partial = Shard::new(&desc, 1, 6, 0);
    let mut out = vec![7.0f32; 4 * 16];
    let args = MergeArgs {
        query_tokens: 1,
        heads: 0,
        head_dim: 0,
        o: Tensor::from_slice(&partial.q),
        o_dtype: Dtype::F32,
        lse: Tensor::from_slice(&partial.lse),
        lse_base: 0,
        plus_inf_is_empty: false,
        out: Tensor::from_slice_mut(&mut out),
        out_dtype: None,
        out_lse: Tensor::NULL,
    };
    // SAFETY: the buffers outlive the call.
    let error = unsafe { plans[0].merge(&args, None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("algorithm: found RING"), "{error}");
    assert!(out.iter().all(|&x| x == 7.0));
    let bits = on_threads(2, |r| {
        let mut shard = Shard::new(&desc, 2, 9, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plans[r].decode(&shard.args(2), None) }.unwrap();
        (shard.out, shard.lse)
    });
    assert_eq!(bits[0], bits[1]);
}

#[test]
fn later_capabilities_are_refused_by_name() {
    let (runtime, comms) = group(1, &CommConfig::default());
    let base = shape();
    let cases = [
        ("k_dtype", AttentionDesc { k_dtype: Dtype::Q8_0, ..base }),
        ("v_dtype", AttentionDesc { v_dtype: Dtype::F8E4M3, ..base }),
        ("window", AttentionDesc { window: 128, ..base }),
        ("softcap", AttentionDesc { softcap: 30.0, ..base }),
        ("alibi", AttentionDesc { alibi: true, ..base }),
        ("sinks", AttentionDesc { sinks: true, ..base }),
        ("mask", AttentionDesc { mask: treeattn::attention::MaskKind::Additive, ..base }),
        ("query_input", AttentionDesc { query_input: QueryInput::Scattered, ..base }),
        ("reproducibility", AttentionDesc { reproducibility: Reproducibility::BatchInvariant, ..base }),
        ("algorithm", AttentionDesc { algorithm: Algorithm::Ring, kv_heads: 0, ..base }),
    ];
    for (field, desc) in cases {
        for error in [
            Plan::create(&comms[0], &desc).err().unwrap(),
            treeattn::runtime::attention_supported(&runtime, CPU, &desc).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{field}: {error}");
            assert!(error.message().starts_with(field), "{field}: {error}");
        }
    }
}

#[test]
fn another_step_is_a_desync_on_every_rank() {
    for odd in 0..3 {
        let (_runtime, comms) = group(3, &quick(Duration::from_secs(20)));
        let desc = shape();
        let errors = on_threads(3, |r| {
            let plan = Plan::create(&comms[r], &desc).unwrap();
            let batch = if r == odd { 2 } else { 1 };
            let mut shard = Shard::new(&desc, batch, 5, r as u32);
            // SAFETY: the shard outlives the blocking call.
            let error = unsafe { plan.decode(&shard.args(batch), None) }.unwrap_err();
            assert!(shard.out.iter().all(|x| x.is_nan()));
            error
        });
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
            assert_eq!(error.rank(), Some(odd as i32), "{error}");
        }
        let status = comms[0].status().unwrap();
        assert_eq!(status.error.unwrap().kind(), ErrorKind::Desync);
        assert_works(3);
    }
}

#[test]
fn a_rank_that_never_comes_is_named_and_the_process_goes_on() {
    let (_runtime, comms) = group(3, &quick(Duration::from_millis(150)));
    let desc = shape();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let errors = on_threads(2, |r| {
        let mut shard = Shard::new(&desc, 1, 5, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plans[r].decode(&shard.args(1), None) }.unwrap_err()
    });
    for error in errors {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(2)), "{error}");
    }
    // Broken for good, on the late rank too.
    let mut shard = Shard::new(&desc, 1, 5, 2);
    // SAFETY: the shard outlives the blocking call.
    let error = unsafe { plans[2].decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert_works(3);
}

#[test]
fn abort_ends_a_wait_at_once() {
    let (_runtime, comms) = group(2, &quick(HANG));
    let desc = shape();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut shard = Shard::new(&desc, 1, 5, 0);
            // SAFETY: the shard outlives the blocking call.
            unsafe { plans[0].decode(&shard.args(1), None) }.unwrap_err()
        });
        thread::sleep(Duration::from_millis(50));
        comms[0].abort().unwrap();
        assert_eq!(waiting.join().unwrap().kind(), ErrorKind::Aborted);
    });
    assert!(began.elapsed() < HANG / 2);
    assert_eq!(comms[1].status().unwrap().error.unwrap().kind(), ErrorKind::Aborted);
    assert_works(2);
}

#[test]
fn a_rank_that_leaves_is_noticed_before_the_deadline() {
    let (_runtime, comms) = group(2, &quick(HANG));
    let desc = shape();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut shard = Shard::new(&desc, 1, 5, 0);
            // SAFETY: the shard outlives the blocking call.
            unsafe { plans[0].decode(&shard.args(1), None) }.unwrap_err()
        });
        thread::sleep(Duration::from_millis(50));
        comms[1].close();
        let error = waiting.join().unwrap();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(1)), "{error}");
    });
}

#[test]
fn children_outlive_their_parents_as_errors() {
    let (runtime, comms) = group(1, &CommConfig::default());
    let desc = shape();
    let plan = Plan::create(&comms[0], &desc).unwrap();
    let stream = Stream::new(&runtime, CPU).unwrap();
    let mut shard = Shard::new(&desc, 1, 5, 0);
    comms[0].close();
    // SAFETY: refused before anything is touched.
    let error = unsafe { plan.decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentDestroyed);
    assert_eq!(shard.out[0], 7.0, "refused calls write nothing");
    assert_eq!(comms[0].status().unwrap_err().kind(), ErrorKind::ParentDestroyed);
    runtime.close();
    assert_eq!(stream.synchronize().unwrap_err().kind(), ErrorKind::ParentDestroyed);
    assert_eq!(Stream::new(&runtime, CPU).err().unwrap().kind(), ErrorKind::ParentDestroyed);
}

#[test]
fn plan_memory_does_not_depend_on_the_cache_length() {
    let (_runtime, comms) = group(1, &CommConfig::default());
    let memory = |length| {
        let desc = AttentionDesc { max_kv_length: length, ..shape() };
        Plan::create(&comms[0], &desc).unwrap().memory().unwrap()
    };
    assert_eq!(memory(64), memory(i32::MAX));
}

#[test]
fn bad_lengths_poison_their_sequence_on_every_rank_and_nothing_else() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let desc = shape();
    let results = on_threads(2, |r| {
        let plan = Plan::create(&comms[r], &desc).unwrap();
        let mut shard = Shard::new(&desc, 3, 5, r as u32);
        if r == 0 {
            shard.length[1] = desc.max_kv_length + 1;
        }
        // SAFETY: the shard outlives the blocking calls.
        let error = unsafe { plan.decode(&shard.args(3), None) }.unwrap_err();
        let bad = shard.out.clone();
        shard.length[1] = 5;
        // SAFETY: as above.
        unsafe { plan.decode(&shard.args(3), None).unwrap() };
        (error, bad, shard.out)
    });
    for (rank, (error, bad, good)) in results.iter().enumerate() {
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(error.message().contains("kv_length") && error.message().contains("sequence 1"), "{error}");
        let row = 4 * 16;
        assert!(bad[row..2 * row].iter().all(|x| x.is_nan()));
        assert_eq!((&bad[..row], &bad[2 * row..]), (&good[..row], &good[2 * row..]));
        let status = comms[rank].status().unwrap();
        assert_eq!((status.error.unwrap().kind(), status.sequence, status.rank), (ErrorKind::InvalidData, 1, 0));
        assert!(comms[rank].status().unwrap().error.is_none(), "reading takes it");
    }
}

#[test]
fn scattered_outputs_are_the_replicated_ones_cut_by_heads() {
    for world in [1usize, 3, 5, 7] {
        let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
        let whole = decode_all(&comms, &shape(), 5);
        let (whole, _) = whole[0].as_ref().unwrap();
        let desc = AttentionDesc { output: OutputMode::Scattered, ..shape() };
        let parts = on_threads(world, |r| {
            let plan = Plan::create(&comms[r], &desc).unwrap();
            let heads = plan.heads();
            let mut shard = Shard::new(&desc, 2, 5, r as u32);
            shard.out = vec![7.0; 2 * heads.len() * 16];
            shard.lse = vec![7.0; 2 * heads.len()];
            // SAFETY: the shard outlives the blocking call.
            unsafe { plan.decode(&shard.args(2), None).unwrap() };
            (heads, shard.out)
        });
        for (heads, out) in parts {
            for (i, head) in heads.clone().enumerate() {
                for token in 0..2 {
                    let part = &out[(token * heads.len() + i) * 16..][..16];
                    assert_eq!(part, &whole[(token * 4 + head) * 16..][..16]);
                }
            }
        }
    }
}

#[test]
fn merging_given_partials_is_decoding() {
    let (runtime, comms) = group(3, &quick(Duration::from_secs(20)));
    let desc = shape();
    let whole = decode_all(&comms, &desc, 5);
    let (whole, whole_lse) = whole[0].as_ref().unwrap();
    let merge_desc = AttentionDesc { kv_heads: 0, ..desc };
    let parts = on_threads(3, |r| {
        let plan = Plan::create(&comms[r], &desc).unwrap();
        let merge = Plan::create(&comms[r], &merge_desc).unwrap();
        let mut shard = Shard::new(&desc, 2, 5, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plan.partial(&shard.args(2), None).unwrap() };
        let lse2: Vec<f32> = shard.lse.iter().map(|l| l * std::f32::consts::LOG2_E).collect();
        let (mut out, mut lse) = (vec![0.0f32; shard.out.len()], vec![0.0f32; lse2.len()]);
        let args = MergeArgs {
            query_tokens: 2,
            heads: 0,
            head_dim: 0,
            o: Tensor::from_slice(&shard.out),
            o_dtype: Dtype::F32,
            lse: Tensor::from_slice(&lse2),
            lse_base: 2,
            plus_inf_is_empty: false,
            out: Tensor::from_slice_mut(&mut out),
            out_dtype: None,
            out_lse: Tensor::from_slice_mut(&mut lse),
        };
        // SAFETY: the buffers outlive the blocking call.
        unsafe { merge.merge(&args, None).unwrap() };
        for (a, b) in out.iter().zip(whole).chain(lse.iter().zip(whole_lse)) {
            assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "{a} {b}");
        }
        (shard.out, shard.lse)
    });
    let o: Vec<f32> = parts.iter().flat_map(|(o, _)| o.clone()).collect();
    let mut lses: Vec<f32> = parts.iter().flat_map(|(_, l)| l.clone()).collect();
    let (mut out, mut lse) = (vec![0.0f32; whole.len()], vec![0.0f32; whole_lse.len()]);
    let mut run = |lses: &[f32], count: usize, plus_inf_is_empty| {
        let args = MergeArgs {
            query_tokens: 2,
            heads: 4,
            head_dim: 16,
            o: Tensor::from_slice(&o),
            o_dtype: Dtype::F32,
            lse: Tensor::from_slice(lses),
            lse_base: 0,
            plus_inf_is_empty,
            out: Tensor::from_slice_mut(&mut out),
            out_dtype: None,
            out_lse: Tensor::from_slice_mut(&mut lse),
        };
        // SAFETY: the buffers outlive the blocking call.
        unsafe { merge_partials(&runtime, CPU, &args, count, None).unwrap() };
        (out.clone(), lse.clone())
    };
    // The same fold in the same order: the same bits as between ranks.
    assert_eq!(run(&lses, 3, false), (whole.clone(), whole_lse.clone()));
    // Rank 1 says +inf for empty: only ranks 0 and 2 count.
    lses[8..16].fill(f32::INFINITY);
    let with_flag = run(&lses, 3, true);
    lses[8..16].fill(f32::NEG_INFINITY);
    assert_eq!(with_flag, run(&lses, 3, false));
}

#[test]
fn groups_come_and_go() {
    let barrier = Barrier::new(2);
    for _ in 0..20 {
        let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
        on_threads(2, |r| {
            let plan = Plan::create(&comms[r], &shape()).unwrap();
            let mut shard = Shard::new(&shape(), 1, 5, r as u32);
            for _ in 0..10 {
                // SAFETY: the shard outlives the blocking call.
                unsafe { plan.decode(&shard.args(1), None).unwrap() };
            }
            barrier.wait();
            comms[r].close();
        });
    }
}
