//! What steps give where nothing fails but data.

use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::{MergeArgs, Plan, Stream, merge_partials};

use super::group::*;

#[test]
fn one_thread_drives_four_ranks_on_streams() {
    let (runtime, comms) = group(4, &quick(Duration::from_secs(20)));
    let desc = shape();
    let plans = plan_all(&comms, &desc);
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
fn a_ring_has_no_partials_to_merge_and_goes_on() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let desc = AttentionDesc { algorithm: Algorithm::Ring, ..shape() };
    let plans = plan_all(&comms, &desc);
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
        out: Tensor::from_slice_mut(&mut out),
        out_dtype: None,
        out_lse: Tensor::NULL,
        ..MergeArgs::default()
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
        assert!(comms[rank].status().unwrap().error.is_none(), "the step has told it");
    }
}

#[test]
fn the_status_says_which_rank_sequence_and_plan_met_bad_data_before() {
    let (runtime, comms) = group(3, &quick(Duration::from_secs(20)));
    let desc = shape();
    let (plans, later) = (plan_all(&comms, &desc), plan_all(&comms, &desc));
    let streams: Vec<_> = comms.iter().map(|_| Stream::new(&runtime, CPU).unwrap()).collect();
    for odd in 0..3 {
        let mut shards: Vec<_> = (0..3).map(|r| Shard::new(&desc, 3, 5, r)).collect();
        shards[odd].length[odd] = desc.max_kv_length + 1;
        let mut good: Vec<_> = (0..3).map(|r| Shard::new(&desc, 3, 5, r)).collect();
        for rank in 0..3 {
            // SAFETY: the shards outlive the steps, which are waited for.
            unsafe {
                plans[rank].decode(&shards[rank].args(3), Some(&streams[rank])).unwrap();
                later[rank].decode(&good[rank].args(3), Some(&streams[rank])).unwrap();
            }
        }
        for (rank, comm) in comms.iter().enumerate() {
            assert!(later[rank].wait(HANG));
            let status = comm.status().unwrap();
            assert_eq!(status.error.unwrap().kind(), ErrorKind::InvalidData);
            assert_eq!((status.rank, status.sequence, status.plan), (odd as i32, odd as i32, 1), "on rank {rank}");
            let status = comm.status().unwrap();
            assert!(status.error.is_none(), "told once");
            assert_eq!((status.rank, status.sequence, status.plan), (-1, -1, 2), "on rank {rank}");
            assert_eq!(status.step, 2 * (odd as u64 + 1));
            streams[rank].synchronize().unwrap();
        }
        // SAFETY: as above, for a blocking call.
        let error = unsafe { plans[odd].partial(&shards[odd].args(3), None) }.unwrap_err();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::InvalidData, Some(odd as i32)), "{error}");
    }
}

#[test]
fn steps_count_decodes_and_merges_and_no_partials() {
    for world in [1, 2] {
        let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
        let desc = shape();
        on_threads(world, |r| {
            let plan = Plan::create(&comms[r], &desc).unwrap();
            let mut shard = Shard::new(&desc, 2, 5, r as u32);
            let decode = shard.args(2);
            // SAFETY: the shard outlives the blocking calls.
            unsafe { plan.partial(&decode, None) }.unwrap();
            let (o, lse) = (shard.out.clone(), shard.lse.clone());
            let merge = MergeArgs {
                query_tokens: 2,
                heads: 0,
                head_dim: 0,
                o: Tensor::from_slice(&o),
                o_dtype: Dtype::F32,
                lse: Tensor::from_slice(&lse),
                lse_base: 0,
                out: decode.out,
                out_dtype: None,
                out_lse: decode.lse,
                ..MergeArgs::default()
            };
            for wanted in [1, 2] {
                // SAFETY: as above.
                unsafe { plan.decode(&decode, None) }.unwrap();
                assert_eq!(plan.stats().unwrap().steps, 2 * wanted - 1, "{world} ranks");
                // SAFETY: as above.
                unsafe { plan.merge(&merge, None) }.unwrap();
                assert_eq!(plan.stats().unwrap().steps, 2 * wanted, "{world} ranks");
            }
        });
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
            out: Tensor::from_slice_mut(&mut out),
            out_dtype: None,
            out_lse: Tensor::from_slice_mut(&mut lse),
            ..MergeArgs::default()
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
            ..MergeArgs::default()
        };
        // SAFETY: the buffers outlive the blocking call.
        unsafe { merge_partials(&runtime, CPU, &args, count, None).unwrap() };
        (out.clone(), lse.clone())
    };
    // The same fold in the same order as between ranks, whose lse is not rounded to one f32.
    let (out, lse) = run(&lses, 3, false);
    for (a, b) in out.iter().zip(whole).chain(lse.iter().zip(whole_lse)) {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{a} {b}");
    }
    // Rank 1 says +inf for empty: only ranks 0 and 2 count.
    lses[8..16].fill(f32::INFINITY);
    let with_flag = run(&lses, 3, true);
    lses[8..16].fill(f32::NEG_INFINITY);
    assert_eq!(with_flag, run(&lses, 3, false));
}

/// The outputs as they lie in memory: a NaN is equal to itself and -0 is not 0.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_rank_without_keys_changes_no_bit() {
    for algorithm in ALGORITHMS {
        for (world, holder) in [(2, 0), (2, 1), (3, 1), (5, 4)] {
            let desc = AttentionDesc { algorithm, ..shape() };
            let mut wanted = Shard::new(&desc, 3, 40, 9);
            let (_runtime, alone) = group(1, &quick(Duration::from_secs(20)));
            let plan = Plan::create(&alone[0], &AttentionDesc { algorithm: Algorithm::Auto, ..desc }).unwrap();
            // SAFETY: the shard outlives the blocking call.
            unsafe { plan.decode(&wanted.args(3), None).unwrap() };
            let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
            let plans = plan_all(&comms, &desc);
            let found = on_threads(world, |r| {
                let mut shard = Shard::new(&desc, 3, if r == holder { 40 } else { 0 }, 9);
                // SAFETY: the shard outlives the blocking call.
                unsafe { plans[r].decode(&shard.args(3), None).unwrap() };
                (bits(&shard.out), bits(&shard.lse))
            });
            for found in found {
                assert_eq!(found, (bits(&wanted.out), bits(&wanted.lse)), "{algorithm:?}, {world} ranks");
            }
        }
    }
}

#[test]
fn an_empty_partial_is_skipped_whatever_lies_in_it() {
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3] {
        for (world, holder) in [(2, 0), (2, 1), (3, 1), (5, 4)] {
            let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
            let desc = AttentionDesc { algorithm, kv_heads: 0, ..shape() };
            let plans = plan_all(&comms, &desc);
            let mut given = Shard::new(&shape(), 2, 5, 9);
            let rows = 2 * 4;
            // Negative zeros, of which adding a zero would make zeros; sums of numerators cannot keep them.
            if algorithm != Algorithm::Allreduce3 {
                given.k.iter_mut().step_by(2).for_each(|x| *x = -0.0);
            }
            let (o, lse) = (&given.k[..rows * 16], &given.v[..rows]);
            let found = on_threads(world, |r| {
                let (mut out, mut out_lse) = (vec![7.0f32; rows * 16], vec![7.0f32; rows]);
                let empty = (vec![f32::NAN; rows * 16], vec![f32::NEG_INFINITY; rows]);
                let (o, lse) = if r == holder { (o, lse) } else { (&empty.0[..], &empty.1[..]) };
                let args = MergeArgs {
                    query_tokens: 2,
                    heads: 0,
                    head_dim: 0,
                    o: Tensor::from_slice(o),
                    o_dtype: Dtype::F32,
                    lse: Tensor::from_slice(lse),
                    lse_base: 0,
                    out: Tensor::from_slice_mut(&mut out),
                    out_dtype: None,
                    out_lse: Tensor::from_slice_mut(&mut out_lse),
                    ..MergeArgs::default()
                };
                // SAFETY: the buffers outlive the blocking call.
                unsafe { plans[r].merge(&args, None).unwrap() };
                (bits(&out), bits(&out_lse))
            });
            for found in found {
                assert_eq!(found, (bits(o), bits(lse)), "{algorithm:?}, {world} ranks");
            }
        }
    }
}
