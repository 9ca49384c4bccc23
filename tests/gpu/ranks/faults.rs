//! Steps that fail, ranks that do not come or that leave, and what the other ranks can still do.

use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Dtype, MaskKind, OutputMode, QueryInput, Tensor};
use treeattn::runtime::{Buffer, Plan};

pub use super::desync::{a_skipped_step, another_batch, another_call, another_graph, out_of_step};
use super::{HANG, LONG, counts};
use crate::driver::{Canary, Current, RawKernel};
use crate::group::{Group, OwnStream, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::full;
use crate::support::rank::{Ints, Rank};
use crate::support::run::judge;
use crate::support::terms::MaskValues;
use crate::support::values::Values;

/// Ways of exchanging whose waits are their own.
pub(super) const WAYS: [(Algorithm, QueryInput); 3] = [
    (Algorithm::OneShot, QueryInput::Replicated),
    (Algorithm::TwoShot, QueryInput::Replicated),
    (Algorithm::OneShot, QueryInput::Scattered),
];

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
            // The same fault in every step is reported once a step.
            for _ in 0..3 {
                group.step(&plans, &mirrors, &mut ranks);
                for (nth, (rank, comm)) in ranks.iter().zip(&group.comms).enumerate() {
                    for head in 0..8 {
                        assert!(rank.row(&case, 1, head).0.iter().all(|x| x.is_nan()));
                        assert!(rank.lse_of(&case, 1, head).unwrap().is_nan());
                        assert!(rank.row(&case, 0, head).0.iter().all(|x| x.is_finite()));
                    }
                    let status = comm.status().unwrap();
                    let error = status.error.unwrap();
                    assert_eq!(error.kind(), ErrorKind::InvalidData);
                    // The value is known where it was met.
                    let wanted = match nth {
                        1 => "kv_length[1]: found -3, wanted 0 to ",
                        _ => "kv_length: found a value out of range in sequence 1 on rank 1",
                    };
                    assert!(error.message().starts_with(wanted), "{error}");
                    assert_eq!((status.rank, status.sequence), (1, 1));
                    assert!(comm.status().unwrap().error.is_none(), "told once");
                }
            }
            ranks[1].set(Ints::KvLength, 1, case.sequences[1].held[1].len() as i32);
            let mirrors = group.mirrors(&ranks);
            group.step(&plans, &mirrors, &mut ranks);
            assert_eq!(judge(&case, &ranks).unwrap().failure, None);
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}

/// A mask that ends too soon on one rank: every rank is told that it is the mask.
pub fn a_short_mask() {
    let group = Group::over(2, 1, LONG);
    let desc = AttentionDesc { mask: MaskKind::Boolean, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    let mut case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
    case.terms.mask = Some(MaskValues { broadcast: [false, true, true], values: vec![vec![0.0; 100]] });
    let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
    let mut mirrors = group.mirrors(&ranks);
    mirrors[1].args.mask.bytes -= 1;
    group.step(&plans, &mirrors, &mut ranks);
    for (nth, (rank, comm)) in ranks.iter().zip(&group.comms).enumerate() {
        assert!(rank.row(&case, 0, 0).0.iter().all(|x| x.is_nan()));
        let error = comm.status().unwrap().error.unwrap();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::InvalidData, Some(1)));
        let wanted = match nth {
            1 => "mask.bytes: found room for 49 keys of sequence 0 on rank 1, wanted for its 50",
            _ => "mask.bytes: found too few for sequence 0 on rank 1",
        };
        assert!(error.message().starts_with(wanted), "{error}");
    }
}

/// Asserts the state of a group whose step failed: NaN, an error of `kind` that names `rank`; and that a new group works.
pub(super) fn failed(group: Group, case: &Case, all: &mut [Rank], survivors: &[usize], kind: ErrorKind, rank: i32) {
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
        for (algorithm, query_input) in WAYS {
            let desc = AttentionDesc { algorithm, query_input, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
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

/// A step that one rank does not take part in ends soon after the deadline: neither before it, nor after another one.
pub fn the_deadline_is_kept() {
    const STEP: Duration = Duration::from_millis(500);
    const SLACK: Duration = Duration::from_millis(400);
    for on in counts() {
        for (algorithm, query_input) in WAYS {
            let desc = AttentionDesc { algorithm, query_input, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
            // A busy machine may be late: the best of a few counts.
            let mut found: Vec<Duration> = Vec::new();
            while found.len() < 4 && found.last().is_none_or(|took| *took >= STEP + SLACK) {
                let group = Group::over(2, on, STEP);
                let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
                let mirrors = group.mirrors(&all);
                group.step(&plans, &mirrors, &mut all);
                let started = Instant::now();
                // SAFETY: the device memory outlives the step, which is waited for.
                unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
                let error = group.gpus[0].stream.synchronize().unwrap_err();
                found.push(started.elapsed());
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
            }
            assert!(found.iter().all(|took| *took >= STEP), "{found:?}");
            assert!(found.last().is_some_and(|took| *took < STEP + SLACK), "{found:?}");
        }
    }
}

/// A graph that was captured before a failure and is replayed after it: NaN at once, and the communicator says why.
pub fn replayed_after_a_failure() {
    const STEP: Duration = Duration::from_secs(2);
    for on in counts() {
        for (algorithm, output) in [
            (Algorithm::OneShot, OutputMode::Replicated),
            (Algorithm::TwoShot, OutputMode::Replicated),
            (Algorithm::Auto, OutputMode::Scattered),
        ] {
            let _current = Current::new(0);
            let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case =
                Case::plain(AttentionDesc { algorithm, output, ..base }, 2, &[(100, 1), (0, 1)], Values::Normal, 5);
            let group = Group::over(2, on, STEP);
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            let lanes = [0, 1].map(|rank| OwnStream::new(&group.gpus[rank]));
            let graphs = [0, 1].map(|rank: usize| {
                let (_current, lane) = (Current::new(lanes[rank].ordinal), &lanes[rank]);
                lane.raw.capture(|| {
                    // SAFETY: the device memory outlives the replays, which are waited for.
                    unsafe { plans[rank].decode(&mirrors[rank].args, Some(&lane.stream)) }.unwrap();
                })
            });
            for replay in 0..4 {
                all[0].prefill(0);
                mirrors[0].update_all(&all[0]);
                if replay == 3 {
                    // The other rank comes after all, and pushes all that this one waited for.
                    graphs[1].replay(&lanes[1].raw);
                    lanes[1].raw.synchronize();
                }
                let started = Instant::now();
                graphs[0].replay(&lanes[0].raw);
                lanes[0].raw.synchronize();
                let took = started.elapsed();
                assert!(replay == 0 || took < STEP / 2, "replay {replay}: {took:?}");
                mirrors[0].fetch(&mut all[0]);
                for token in 0..case.tokens {
                    for head in all[0].heads.clone() {
                        let (row, lse) = (all[0].row(&case, token, head).0, all[0].lse_of(&case, token, head));
                        assert!(row.iter().all(|x| x.is_nan()) && lse.unwrap().is_nan(), "replay {replay}: {row:?}");
                    }
                }
                let error = group.comms[0].status().unwrap().error.unwrap();
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
            }
        }
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
        // A step of the broken communicator writes NaN, and its outputs are checked first: kernels write to no host memory.
        let mut host = [7.0f32; 8 * 64];
        let out = Tensor { data: host.as_mut_ptr().cast(), ..mirrors[0].args.out };
        let args = DecodeArgs { out, ..mirrors[0].args };
        // SAFETY: the step is refused, and nothing is written.
        let error = unsafe { plans[0].decode(&args, Some(&group.gpus[0].stream)) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Aborted);
        // Nothing is under way then, whether the abort is told again or not.
        let _ = group.gpus[0].stream.synchronize();
        assert!(host.iter().all(|&x| x == 7.0));
        drop(plans);
        failed(group, &case, &mut all, &[0], ErrorKind::Aborted, 1);
    }
}

/// A rank leaves while another has steps in flight: a step that it had sent its rows of succeeds, any other fails.
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
        leave_in_own_step(&case, on);
    }
}

/// A rank that leaves ends its own step, which waits for another, long before the deadline.
fn leave_in_own_step(case: &Case, on: usize) {
    let group = Group::over(2, on, HANG);
    let (mut all, plans) = (ranks(case), group.plans(&case.desc));
    let mirrors = group.mirrors(&all);
    let started = Instant::now();
    // SAFETY: the device memory outlives the step, which is waited for.
    unsafe { plans[1].decode(&mirrors[1].args, Some(&group.gpus[1].stream)) }.unwrap();
    group.comms[1].close();
    let error = group.gpus[1].stream.synchronize().unwrap_err();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::ParentDestroyed, Some(1)), "{error}");
    assert!(started.elapsed() < HANG / 4, "{:?}", started.elapsed());
    mirrors[1].fetch(&mut all[1]);
    assert!(all[1].row(case, 0, 3).0.iter().all(|x| x.is_nan()));
    let step = || {
        // SAFETY: as above.
        unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }
            .and_then(|()| group.gpus[0].stream.synchronize())
    };
    // Its rows were sent in one step, which may succeed; the next one fails.
    let error = step().and_then(|()| step()).unwrap_err();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(1)), "{error}");
}

/// A rank has destroyed its communicator and its plan before another's rows come: these are written to the window that it had
/// and nowhere else, above all not to what has been allocated since.
pub fn leave_before_rows_come() {
    let rounds = if full() { 1000 } else { 4 };
    for on in counts() {
        let _current = Current::new(0);
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
        for round in 0..rounds {
            let mut group = Group::over(2, on, Duration::from_millis(100));
            let (mut all, mut plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            let (lane, memory) = (OwnStream::new(&group.gpus[0]), plans[1].memory().unwrap());
            let mut gone = plans.pop();
            if round % 2 == 0 {
                // Before there is work of the other rank, for which it would wait on a GPU that they share.
                gone = None;
            }
            lane.pause(Duration::from_micros([0, 100, 1000, 5000][round / 2 % 4]));
            // SAFETY: the device memory outlives the step, which is waited for.
            unsafe { plans[0].decode(&mirrors[0].args, Some(&lane.stream)) }.unwrap();
            // The communicator first: giving back the plan's memory waits for all work of a GPU that they share.
            group.comms.pop().unwrap().close();
            drop(gone);
            let there = group.gpus[1].device.ordinal;
            let canaries = [memory.window, memory.workspace].map(|bytes| Canary::new(there, bytes as usize));
            let error = lane.stream.synchronize().unwrap_err();
            assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(1)), "round {round}: {error}");
            for left in [Some((plans, group)), None] {
                assert!(canaries.iter().all(Canary::lives), "round {round}: somebody wrote to memory of another");
                drop(left);
            }
        }
    }
}

/// Allocations by another thread while a rank waits: the wait ends when the other rank comes, or by its deadline.
pub fn allocations() {
    for on in counts() {
        for comes in [true, false] {
            let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
            let group = Group::over(2, on, if comes { LONG } else { Duration::from_millis(500) });
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            let begun = Instant::now();
            // SAFETY: the device memory outlives the step, which is waited for.
            unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
            std::thread::scope(|scope| {
                let allocating = scope.spawn(|| {
                    let gpus = &group.gpus;
                    let some = gpus.iter().map(|gpu| Buffer::alloc(&gpu.runtime, gpu.device, 40 << 20).unwrap());
                    let canaries = gpus.iter().map(|gpu| Canary::new(gpu.device.ordinal, 40 << 20));
                    (some.collect::<Vec<_>>(), canaries.collect::<Vec<_>>())
                });
                // In the middle of the allocations, or after them if they are fast.
                std::thread::sleep(Duration::from_millis(20));
                if comes {
                    // SAFETY: as above.
                    unsafe { plans[1].decode(&mirrors[1].args, Some(&group.gpus[1].stream)) }.unwrap();
                    group.gpus.iter().for_each(|gpu| gpu.stream.synchronize().unwrap());
                } else {
                    let error = group.gpus[0].stream.synchronize().unwrap_err();
                    assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
                }
                let (_, canaries) = allocating.join().unwrap();
                assert!(canaries.iter().all(Canary::lives));
            });
            assert!(begun.elapsed() < HANG);
            if comes {
                mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
                assert_eq!(judge(&case, &all).unwrap().failure, None);
            } else {
                drop(plans);
                failed(group, &case, &mut all, &[0], ErrorKind::Timeout, 1);
            }
        }
    }
}

/// Another thread loads modules while a rank waits. A driver may let that wait for the kernel, and hold up the launch that
/// the kernel waits for: then the deadline ends it. It never hangs.
pub fn module_loading() {
    for on in counts() {
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
        let group = Group::over(2, on, Duration::from_secs(2));
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        let begun = Instant::now();
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
        let ended = std::thread::scope(|scope| {
            let loading = scope.spawn(|| {
                for gpu in &group.gpus {
                    let _current = Current::new(gpu.device.ordinal);
                    for _ in 0..3 {
                        let _kernel = RawKernel::new("late_copy");
                    }
                }
            });
            // In the middle of it.
            std::thread::sleep(Duration::from_millis(5));
            // SAFETY: as above.
            unsafe { plans[1].decode(&mirrors[1].args, Some(&group.gpus[1].stream)) }.unwrap();
            let ended: Vec<_> = group.gpus.iter().filter_map(|gpu| gpu.stream.synchronize().err()).collect();
            loading.join().unwrap();
            ended.into_iter().next()
        });
        assert!(begun.elapsed() < HANG);
        match ended {
            None => {
                mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
                assert_eq!(judge(&case, &all).unwrap().failure, None);
            }
            Some(error) => {
                println!("on {on} GPUs loading a module held the other rank up: {error}");
                assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            }
        }
    }
}

/// Ranks whose plans differ: every one of them hears in which field, and goes on.
pub fn mismatch() {
    for on in counts() {
        let group = Group::over(3, on, LONG);
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 3, &[(100, 1)], Values::Normal, 5);
        let other = AttentionDesc { wire_dtype: Dtype::Bf16, ..case.desc };
        std::thread::scope(|scope| {
            let (case, other) = (&case, &other);
            let created: Vec<_> = group
                .comms
                .iter()
                .map(|comm| scope.spawn(|| Plan::create(comm, if comm.rank() == 1 { other } else { &case.desc })))
                .collect();
            for error in created.into_iter().map(|thread| thread.join().unwrap().err().unwrap()) {
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(1)), "{error}");
                assert!(error.message().starts_with("wire_dtype:"), "{error}");
            }
        });
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        assert_eq!(judge(&case, &all).unwrap().failure, None);
    }
}

/// Bad data of now one rank and now another, whose rows go to the owners of their heads: all ranks hear of it.
pub fn bad_data_of_others() {
    for on in counts() {
        for (world, heads) in [(2, 8), (3, 4)] {
            let group = Group::over(world, on, LONG);
            let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(heads, 1, 64, Dtype::F16) };
            let desc = AttentionDesc { output: OutputMode::Scattered, ..base };
            let case = Case::plain(desc, world, &[(100, 1), (90, 1), (80, 1)], Values::Normal, 5);
            let (mut ranks, plans) = (ranks(&case), group.plans(&case.desc));
            for bad in 0..world {
                ranks[bad].set(Ints::KvLength, 2, -3);
                let mirrors = group.mirrors(&ranks);
                group.step(&plans, &mirrors, &mut ranks);
                for (rank, comm) in ranks.iter().zip(&group.comms) {
                    for head in rank.heads.clone() {
                        assert!(rank.row(&case, 2, head).0.iter().all(|x| x.is_nan()));
                        assert!(rank.row(&case, 1, head).0.iter().all(|x| x.is_finite()));
                    }
                    let status = comm.status().unwrap();
                    let kind = status.error.map(|error| error.kind());
                    let found = (kind, status.rank, status.sequence);
                    let wanted = (Some(ErrorKind::InvalidData), bad as i32, 2);
                    assert_eq!(found, wanted, "rank {} of {world} with {heads} heads", comm.rank());
                }
                ranks[bad].set(Ints::KvLength, 2, case.sequences[2].held[bad].len() as i32);
            }
            let mirrors = group.mirrors(&ranks);
            group.step(&plans, &mirrors, &mut ranks);
            assert_eq!(judge(&case, &ranks).unwrap().failure, None);
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}
