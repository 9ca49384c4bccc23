//! Steps over NCCL that fail: bad data, ranks that do not come, that leave, or that run something else.

use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, Dtype};
use treeattn::runtime::Plan;

use super::{HANG, group, over_nccl};
use crate::group::{Group, nodes, ranks};
use crate::mirror::Mirror;
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::Ints;
use crate::support::run::judge;
use crate::support::values::Values;

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
