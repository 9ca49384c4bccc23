//! Ranks that run different steps at the same time: other shapes, other calls, a step left out.

use std::time::Duration;

use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, QueryInput, Tensor};
use treeattn::runtime::MergeArgs;
use treeattn::{ErrorKind, Result};

use super::faults::{WAYS, failed};
use super::{LONG, counts};
use crate::driver::Current;
use crate::group::{Group, OwnStream, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::values::Values;

/// The result of enqueueing one of several steps that differ. The steps enqueued first may have failed already, and then the
/// call itself returns that error.
fn enqueued(result: Result<()>) {
    if let Err(error) = result {
        assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
    }
}

/// Ranks whose steps differ in their plans.
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
            enqueued(unsafe { plan.decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) });
        }
        drop((plans, others));
        failed(group, &case, &mut all, &[0, 1, 2], ErrorKind::Desync, 1);
    }
}

/// One rank has the tokens of a step in two sequences, or fewer tokens: all else is the same.
pub fn another_batch() {
    for on in counts() {
        for (algorithm, query_input) in WAYS {
            for sequences in [&[(50, 1), (50, 1)][..], &[(100, 1)]] {
                let base = AttentionDesc { algorithm, query_input, max_batch: 2, ..shape(8, 2, 64, Dtype::F16) };
                let desc = AttentionDesc { out_dtype: Dtype::F32, max_kv_length: 100, max_query_tokens: 2, ..base };
                let case = Case::plain(desc, 3, &[(100, 2)], Values::Normal, 5);
                let other = Case::plain(desc, 3, sequences, Values::Normal, 6);
                assert_eq!(case.desc, other.desc);
                let group = Group::over(3, on, LONG);
                let (mut all, others) = (ranks(&case), ranks(&other));
                let (plans, mirrors, odd) = (group.plans(&desc), group.mirrors(&all), group.mirrors(&others));
                for rank in 0..3 {
                    let mirror = if rank == 1 { &odd[rank] } else { &mirrors[rank] };
                    // SAFETY: the device memory outlives the step, which is waited for.
                    enqueued(unsafe { plans[rank].decode(&mirror.args, Some(&group.gpus[rank].stream)) });
                }
                drop(plans);
                failed(group, &case, &mut all, &[0, 1, 2], ErrorKind::Desync, 1);
            }
        }
    }
}

/// One rank merges given partials where the others decode. Without queries nothing else tells the two apart.
pub fn another_call() {
    for on in counts() {
        for (tokens, query_input) in [1, 0].into_iter().flat_map(|tokens| QueryInput::ALL.map(|input| (tokens, input)))
        {
            let desc = AttentionDesc { query_input, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, 3, &[(100, 1)], Values::Normal, 5);
            let group = Group::over(3, on, LONG);
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            for rank in 0..3 {
                let (args, stream) = (&mirrors[rank].args, Some(&group.gpus[rank].stream));
                let merge = MergeArgs {
                    query_tokens: tokens,
                    heads: 0,
                    head_dim: 0,
                    // Any memory of the device: what is merged is never looked at.
                    o: Tensor { stride: [0; 4], ..args.k },
                    o_dtype: Dtype::F16,
                    lse: Tensor { stride: [0; 4], ..args.k },
                    lse_base: 0,
                    out: args.out,
                    out_dtype: None,
                    out_lse: args.lse,
                    ..MergeArgs::default()
                };
                let decode = if tokens == 0 { DecodeArgs { batch: 0, query_tokens: 0, ..*args } } else { *args };
                // SAFETY: the device memory outlives the step, which is waited for.
                enqueued(unsafe {
                    match rank {
                        1 => plans[rank].merge(&merge, stream),
                        _ => plans[rank].decode(&decode, stream),
                    }
                });
            }
            drop(plans);
            failed(group, &case, &mut all, &[0, 1, 2], ErrorKind::Desync, 1);
        }
    }
}

/// One rank leaves a step out. If the next step differs, all ranks report it; if it is the same, the others wait for the last
/// one until their deadline.
pub fn a_skipped_step() {
    for on in counts() {
        for same in [false, true] {
            let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, 3, &[(100, 1)], Values::Normal, 5);
            let group = Group::over(3, on, if same { Duration::from_millis(500) } else { LONG });
            let mut all = ranks(&case);
            let plans = [group.plans(&case.desc), group.plans(&case.desc)];
            let mirrors = group.mirrors(&all);
            for step in 0..4 {
                for rank in 0..3 {
                    if (step, rank) != (1, 1) {
                        let plan = &plans[if same { 0 } else { step % 2 }][rank];
                        // SAFETY: the device memory outlives the step, which is waited for.
                        let result = unsafe { plan.decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) };
                        if same { result.unwrap() } else { enqueued(result) }
                    }
                }
            }
            drop(plans);
            let (kind, survivors) =
                if same { (ErrorKind::Timeout, &[0, 2][..]) } else { (ErrorKind::Desync, &[0, 1, 2][..]) };
            failed(group, &case, &mut all, survivors, kind, 1);
        }
    }
}

/// One rank replays another graph than the others: it holds the steps of another plan.
pub fn another_graph() {
    for on in counts() {
        let _current = Current::new(0);
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 3, &[(100, 1)], Values::Normal, 5);
        let group = Group::over(3, on, LONG);
        let mut all = ranks(&case);
        let plans = [group.plans(&case.desc), group.plans(&case.desc)];
        let mirrors = group.mirrors(&all);
        for plans in &plans {
            group.step(plans, &mirrors, &mut all);
        }
        let lanes: Vec<OwnStream> = group.gpus.iter().map(OwnStream::new).collect();
        let graphs = plans.each_ref().map(|plans| {
            let capture = |rank: usize| {
                let (_current, lane) = (Current::new(lanes[rank].ordinal), &lanes[rank]);
                lane.raw.capture(|| {
                    // SAFETY: the device memory outlives the replays, which are waited for.
                    unsafe { plans[rank].decode(&mirrors[rank].args, Some(&lane.stream)) }.unwrap();
                })
            };
            (0..3).map(capture).collect::<Vec<_>>()
        });
        for odd in [false, true] {
            for (rank, lane) in lanes.iter().enumerate() {
                graphs[usize::from(odd && rank == 1)][rank].replay(&lane.raw);
            }
            for (rank, lane) in lanes.iter().enumerate() {
                lane.raw.synchronize();
                let error = group.comms[rank].status().unwrap().error;
                let found = error.map(|error| (error.kind(), error.rank()));
                assert_eq!(found, odd.then_some((ErrorKind::Desync, Some(1))), "rank {rank}");
            }
        }
        drop((graphs, plans));
        drop(lanes);
        failed(group, &case, &mut all, &[], ErrorKind::Desync, 1);
    }
}
