//! Weighted output: each rank's own part of every row, under one log-sum-exp.

use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, Dtype, OutputMode, QueryInput};
use treeattn::runtime::Stream;

use super::{LONG, counts};
use crate::driver::{Current, RawStream};
use crate::group::{Group, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::values::Values;

/// Asserts that the parts of all ranks add up to the answer in float64, and that all have the same log-sum-exp.
fn assert_adds_up(case: &Case, all: &[Rank]) {
    for token in 0..case.tokens {
        for head in 0..case.desc.q_heads as usize {
            let (wanted, lse) = case.answer(token, head, None);
            let parts: Vec<Vec<f32>> = all.iter().map(|rank| rank.row(case, token, head).0).collect();
            for (d, &x) in wanted.iter().enumerate() {
                let sum: f64 = parts.iter().map(|part| f64::from(part[d])).sum();
                assert!(
                    (sum - x).abs() <= 1e-5 * (1.0 + x.abs()),
                    "token {token}, head {head}, {d}: {sum}, wanted {x}"
                );
            }
            for rank in all {
                let found = f64::from(rank.lse_of(case, token, head).unwrap());
                assert!(found == lse || (found - lse).abs() <= 1e-5 * (1.0 + lse.abs()), "{found}, wanted {lse}");
            }
        }
    }
    assert!(all.iter().all(|rank| rank.lse.bytes() == all[0].lse.bytes()), "other log-sum-exps");
}

fn weighted(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc { output: OutputMode::Weighted, out_dtype: Dtype::F32, ..desc }
}

/// Two to four ranks, some without keys; sinks, drafts, queries by heads, a checked plan; the same bits again, and the log-sum-exps
/// of a merged output.
pub fn parts_add_up() {
    for (n, world) in [2, 3, 4].into_iter().enumerate() {
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        for query_input in QueryInput::ALL {
            let base = AttentionDesc { query_input, sinks: n == 1, causal: true, ..shape(8, 2, 64, Dtype::Bf16) };
            let mut case = Case::plain(weighted(base), world, &[(90, 1), (40, 4), (0, 1), (33, 2)], Values::Normal, 4);
            case.desc.checked = n == 2;
            for sequence in &mut case.sequences[..2] {
                sequence.held = vec![Vec::new(); world];
                sequence.held[n] = (0..sequence.keys).collect();
            }
            case.desc.max_kv_length = 90;
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            let mut first = Vec::new();
            for fill in [0xff, 0x3c] {
                for (mirror, rank) in mirrors.iter().zip(&mut all) {
                    rank.prefill(fill);
                    mirror.update_all(rank);
                }
                group.step(&plans, &mirrors, &mut all);
                assert!(all.iter().all(|rank| rank.strays(&case, fill) == 0), "wrote beside its outputs");
                assert_adds_up(&case, &all);
                let bits: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
                assert!(first.is_empty() || first == bits, "other bits");
                first = bits;
            }
            let merged = Case { desc: AttentionDesc { output: OutputMode::Replicated, ..case.desc }, ..case.clone() };
            let (mut others, plans) = (ranks(&merged), group.plans(&merged.desc));
            let mirrors = group.mirrors(&others);
            group.step(&plans, &mirrors, &mut others);
            for (token, head) in (0..case.tokens).flat_map(|token| (0..8).map(move |head| (token, head))) {
                let [a, b] = [&all[0], &others[0]].map(|rank| rank.lse_of(&case, token, head).unwrap().to_bits());
                assert_eq!(a, b, "the merged log-sum-exp of token {token}, head {head}");
            }
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}

/// A length out of range on one rank is NaN for that sequence, and the same report, on every rank, in every step.
pub fn bad_data() {
    let group = Group::over(3, counts().pop().unwrap(), LONG);
    let case = Case::plain(weighted(shape(8, 2, 64, Dtype::F16)), 3, &[(100, 1), (90, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    all[1].set(Ints::KvLength, 1, -3);
    let mirrors = group.mirrors(&all);
    for _ in 0..2 {
        group.step(&plans, &mirrors, &mut all);
        for (rank, comm) in all.iter().zip(&group.comms) {
            for head in 0..8 {
                assert!(rank.row(&case, 1, head).0.iter().all(|x| x.is_nan()));
                assert!(rank.lse_of(&case, 1, head).unwrap().is_nan());
                assert!(rank.row(&case, 0, head).0.iter().all(|x| x.is_finite()));
            }
            let status = comm.status().unwrap();
            assert_eq!(status.error.unwrap().kind(), ErrorKind::InvalidData);
            assert_eq!((status.rank, status.sequence), (1, 1));
            assert!(comm.status().unwrap().error.is_none(), "told once");
        }
    }
    let mut mended = ranks(&case);
    let mirrors = group.mirrors(&mended);
    group.step(&plans, &mirrors, &mut mended);
    assert_adds_up(&case, &mended);
}

/// A step that one rank does not take part in ends by the deadline, with NaN, and so do the steps behind it.
pub fn a_rank_that_does_not_come() {
    let group = Group::over(3, counts().pop().unwrap(), Duration::from_millis(500));
    let case = Case::plain(weighted(shape(8, 2, 64, Dtype::F16)), 3, &[(100, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    group.step(&plans, &mirrors, &mut all);
    assert_adds_up(&case, &all);
    for rank in [0, 2, 0, 2] {
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
    }
    for rank in [0, 2] {
        let error = group.gpus[rank].stream.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
        mirrors[rank].fetch(&mut all[rank]);
        assert!(all[rank].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
        assert!(all[rank].lse_of(&case, 0, 3).unwrap().is_nan());
        // SAFETY: as above.
        let error = unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }
}

/// Eight bytes a row and head travel.
pub fn accounts() {
    for world in [2, 3] {
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        let case = Case::plain(weighted(shape(5, 1, 64, Dtype::F16)), world, &[(40, 3), (0, 1)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        for step in 1..=2 {
            group.step(&plans, &mirrors, &mut all);
            for plan in &plans {
                let (found, others) = (plan.stats().unwrap(), world as u64 - 1);
                let wanted = (step, step * others, step * others * 4 * 5 * 8);
                assert_eq!((found.rounds, found.messages, found.bytes_sent), wanted);
                assert!(found.reason.starts_with("weighted output"), "{}", found.reason);
            }
        }
        let local = group.plans(&AttentionDesc { output: OutputMode::Local, ..case.desc });
        let [own, local] = [&plans[0], &local[0]].map(|plan| plan.memory().unwrap().workspace);
        assert_eq!(own - local, (4 * 5 * 64 * 4u64).next_multiple_of(256) + 4 * 5 * 8);
    }
}

/// Captured once on every rank, replayed over other lengths.
pub fn replays() {
    let group = Group::over(2, counts().pop().unwrap(), LONG);
    let desc = AttentionDesc { query_input: QueryInput::Scattered, ..shape(8, 2, 64, Dtype::F16) };
    let case = Case::plain(weighted(desc), 2, &[(400, 1), (90, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    let graphs: Vec<_> = (0..2)
        .map(|rank| {
            let gpu = &group.gpus[rank];
            let (current, raw) = (Current::new(gpu.device.ordinal), RawStream::new());
            // SAFETY: the raw stream outlives the wrapped one, which is gone after the capture.
            let stream = unsafe { Stream::wrap_cuda(&gpu.runtime, gpu.device, raw.pointer()) }.unwrap();
            // SAFETY: the device memory outlives the replays, which are waited for.
            let step = || unsafe { plans[rank].decode(&mirrors[rank].args, Some(&stream)) }.unwrap();
            let graph = raw.capture(|| [(); 3].iter().for_each(|()| step()));
            (graph, raw, current)
        })
        .collect();
    for lengths in [[200, 45], [17, 0], [0, 45]] {
        for (mirror, rank) in mirrors.iter().zip(&mut all) {
            lengths.iter().enumerate().for_each(|(b, &length)| rank.set(Ints::KvLength, b, length));
            rank.prefill(0xff);
            mirror.update_all(rank);
        }
        group.step(&plans, &mirrors, &mut all);
        let eager: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
        for (mirror, rank) in mirrors.iter().zip(&mut all) {
            rank.prefill(0xff);
            mirror.update_all(rank);
        }
        for _ in 0..3 {
            graphs.iter().for_each(|(graph, raw, _)| graph.replay(raw));
        }
        graphs.iter().for_each(|(_, raw, _)| raw.synchronize());
        mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
        let bits: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
        assert!(bits == eager, "{lengths:?}: other bits in a replay");
    }
    assert!(group.errors().into_iter().flatten().next().is_none());
    // In reverse: contexts are a stack.
    graphs.into_iter().rev().for_each(drop);
}
