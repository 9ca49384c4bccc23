//! Many steps, of several plans and communicators, eager and in graphs: each gets what is its own.

use treeattn::attention::{AttentionDesc, Dtype, OutputMode};
use treeattn::runtime::{Plan, Stream};

use super::{LONG, counts};
use crate::driver::{Current, RawStream};
use crate::group::{Group, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::full;
use crate::support::rank::{Ints, Rank};
use crate::support::run::judge;
use crate::support::values::Values;

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
