//! Many steps, of several plans and communicators, eager and in graphs: each gets its own answer.

use std::time::Duration;

use cudarc::driver::sys;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, QueryInput};
use treeattn::runtime::{Buffer, Plan, Stream};

use super::{LONG, counts};
use crate::driver::{Current, RawKernel, RawStream, ok};
use crate::group::{Group, OwnStream, ranks};
use crate::mirror::{Gpu, Mirror};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::full;
use crate::support::rank::{Ints, Rank};
use crate::support::rng::Rng;
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
                    AttentionDesc { output: OutputMode::Scattered, query_input: QueryInput::Scattered, ..desc },
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

/// The number of an epoch comes again, and what its step left in the windows is no part of the new one: small steps in between
/// have cleaned it away.
pub fn numbers_come_again() {
    const START: u32 = 10;
    // As `clean_next` of kernels/ll.cuh: words of a piece, and epochs between two pieces.
    const WORDS: u64 = 1024;
    const EVERY: u64 = 256;
    for on in counts() {
        for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
            let group = Group::starting_at(2, on, LONG, START);
            let desc = AttentionDesc { algorithm, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let large = |seed| Case::plain(desc, 2, &[(60, 1), (50, 1), (40, 1)], Values::Normal, seed);
            let (old, new) = (large(5), large(6));
            let small = Case { desc: old.desc, ..Case::plain(desc, 2, &[(30, 1)], Values::Normal, 7) };
            let plans = group.plans(&old.desc);
            let steps = |case: &Case| {
                let mut all = ranks(case);
                let mirrors = group.mirrors(&all);
                for _ in 0..2 {
                    group.step(&plans, &mirrors, &mut all);
                    assert_eq!(judge(case, &all).unwrap().failure, None);
                }
            };
            // SAFETY: `steps` waits for its steps, so that none is enqueued.
            let restart =
                |start: u64| group.comms.iter().for_each(|comm| unsafe { comm.restart_at(start as u32) }.unwrap());
            steps(&old);
            // A window has, beside its control words, a slot a rank and one for merged rows, of either parity.
            let slot = (plans[0].memory().unwrap().window / 8 - 512) / 6;
            let pieces = (3 * slot).div_ceil(WORDS);
            for piece in (0..3).flat_map(|nth| [0, 1].map(|more| nth * slot / WORDS + more)) {
                restart((pieces + piece) * EVERY - 1);
                steps(&small);
            }
            restart(START.into());
            let mut all = ranks(&new);
            let mirrors = group.mirrors(&all);
            for _ in 0..2 {
                for (rank, (plan, mirror)) in plans.iter().zip(&mirrors).enumerate() {
                    // The first looks before the second has sent anything.
                    std::thread::sleep(Duration::from_millis(20));
                    // SAFETY: the device memory outlives the step, which is waited for.
                    unsafe { plan.decode(&mirror.args, Some(&group.gpus[rank].stream)) }.unwrap();
                }
                group.gpus.iter().for_each(|gpu| gpu.stream.synchronize().unwrap());
                mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
                assert_eq!(judge(&new, &all).unwrap().failure, None);
            }
        }
    }
}

/// Captured on every rank by one thread, replayed over other lengths.
pub fn replays() {
    for (on, query_input) in counts().into_iter().flat_map(|on| QueryInput::ALL.map(|input| (on, input))) {
        let world = 2;
        let group = Group::over(world, on, LONG);
        let desc = AttentionDesc { query_input, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
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

/// A graph in which two plans take turns, replayed while now one rank is late and now another: after every replay the
/// outputs of both plans hold the bits of eager steps.
pub fn delayed_replays() {
    const AT_ONCE: usize = 8;
    let rounds = if full() { 10_000 / AT_ONCE } else { 3 };
    let mut rng = Rng::new(crate::support::seed());
    for on in counts() {
        for world in [2, 3] {
            let _current = Current::new(0);
            let group = Group::over(world, on, LONG);
            let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let (output, query_input) = (OutputMode::Scattered, QueryInput::Scattered);
            let scattered = AttentionDesc { output, query_input, ..desc };
            let cases = [(desc, &[(60, 1)][..]), (scattered, &[(20, 1), (33, 2)])]
                .map(|(desc, sequences)| Case::plain(desc, world, sequences, Values::Normal, 5));
            let plans = cases.each_ref().map(|case| group.plans(&case.desc));
            let mut all = cases.each_ref().map(ranks);
            let mirrors = all.each_ref().map(|ranks| group.mirrors(ranks));
            for n in 0..2 {
                group.step(&plans[n], &mirrors[n], &mut all[n]);
                assert_eq!(judge(&cases[n], &all[n]).unwrap().failure, None);
            }
            let lanes: Vec<OwnStream> = group.gpus.iter().map(OwnStream::new).collect();
            let graphs: Vec<_> = (0..world)
                .map(|rank| {
                    let (_current, lane) = (Current::new(lanes[rank].ordinal), &lanes[rank]);
                    lane.raw.capture(|| {
                        mirrors.iter().for_each(|mirrors| poison(&mirrors[rank], &lane.raw));
                        for n in [0, 1, 0, 1] {
                            // SAFETY: the device memory outlives the replays, which are waited for.
                            unsafe { plans[n][rank].decode(&mirrors[n][rank].args, Some(&lane.stream)) }.unwrap();
                        }
                    })
                })
                .collect();
            let copies: Vec<OutputCopies> = (0..world)
                .map(|rank| OutputCopies::new(&group.gpus[rank], [&mirrors[0][rank], &mirrors[1][rank]], AT_ONCE))
                .collect();
            let wanted: Vec<Vec<u8>> = copies.iter().map(OutputCopies::now).collect();
            for round in 0..rounds {
                for replay in 0..AT_ONCE {
                    let (late, time) = (rng.range(0, world - 1), rng.pick(&[0, 20, 200, 2000]));
                    for (rank, lane) in lanes.iter().enumerate() {
                        if rank == late {
                            lane.pause(Duration::from_micros(time));
                        }
                        graphs[rank].replay(&lane.raw);
                        copies[rank].enqueue(replay, lane);
                    }
                }
                for (rank, lane) in lanes.iter().enumerate() {
                    lane.raw.synchronize();
                    let found = copies[rank].all();
                    let same = found.chunks_exact(wanted[rank].len()).all(|bytes| *bytes == wanted[rank]);
                    assert!(same, "rank {rank} of {world} over {on} GPUs: other bits in round {round}");
                }
            }
            assert!(group.errors().into_iter().flatten().next().is_none());
        }
    }
}

/// Enqueues that a rank's outputs are NaN.
fn poison(mirror: &Mirror, stream: &RawStream) {
    let (at, bytes) = mirror.outputs();
    // SAFETY: the memory is the mirror's.
    ok(unsafe { sys::cuMemsetD8Async(at, 0xff, bytes, stream.0) });
}

/// Copies of a rank's outputs of two plans, on its GPU.
struct OutputCopies {
    copy: RawKernel,
    ordinal: i32,
    /// Address and words of 16 bytes of what is copied; what follows the outputs is the mirror's as well.
    from: [(u64, usize); 2],
    to: Buffer,
}

impl OutputCopies {
    fn new(gpu: &Gpu, mirrors: [&Mirror; 2], count: usize) -> OutputCopies {
        let ordinal = gpu.device.ordinal;
        let _current = Current::new(ordinal);
        let from = mirrors.map(|mirror| (mirror.outputs().0, mirror.outputs().1.div_ceil(16)));
        let to = Buffer::alloc(&gpu.runtime, gpu.device, count * 16 * (from[0].1 + from[1].1)).unwrap();
        OutputCopies { copy: RawKernel::new("late_copy"), ordinal, from, to }
    }

    /// Bytes of a copy.
    fn bytes(&self) -> usize {
        16 * (self.from[0].1 + self.from[1].1)
    }

    /// Enqueues a copy.
    fn enqueue(&self, nth: usize, lane: &OwnStream) {
        let _current = Current::new(self.ordinal);
        let mut to = self.to.data() as u64 + (nth * self.bytes()) as u64;
        for (from, words) in self.from {
            self.copy.launch(&lane.raw, 1, &[from, to, words as u64, 0]);
            to += 16 * words as u64;
        }
    }

    /// All copies.
    fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.to.bytes()];
        self.to.download(0, &mut bytes).unwrap();
        bytes
    }

    /// What the outputs are.
    fn now(&self) -> Vec<u8> {
        let (_current, mut bytes) = (Current::new(self.ordinal), vec![0; self.bytes()]);
        let (first, second) = bytes.split_at_mut(16 * self.from[0].1);
        for (part, (from, _)) in [first, second].into_iter().zip(self.from) {
            // SAFETY: as long as what is copied.
            ok(unsafe { sys::cuMemcpyDtoH_v2(part.as_mut_ptr().cast(), from, part.len()) });
        }
        bytes
    }
}

/// A batch of which one rank holds more and more of each sequence and the other less and less, so that they finish rows in
/// other orders, while steps of another plan, which exchange nothing, have half of the GPU.
pub fn beside_others(batch: usize) {
    let steps = if full() { 200 } else { 2 };
    for on in counts() {
        let (group, others) = (Group::over(2, on, LONG), Group::over(2, on, LONG));
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let mut case = Case::plain(desc, 2, &vec![(batch, 1); batch], Values::Normal, 12);
        for (b, sequence) in case.sequences.iter_mut().enumerate() {
            sequence.held = vec![(0..b).collect(), (b..batch).collect()];
        }
        case.desc.max_kv_length = batch as i32;
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        let busy = Case::plain(desc, 1, &[(40 * batch, 1)], Values::Normal, 13);
        let busy_plans = others.plans(&busy.desc);
        let (busy_rank, mut first) = (Rank::new(&busy, 0), Vec::new());
        let busy_mirror = Mirror::new(&others.gpus[0], &busy_rank);
        for round in 0..2 {
            for step in 0..steps {
                for _ in 0..step % 3 {
                    // SAFETY: the device memory outlives the step, which is waited for.
                    unsafe { busy_plans[0].partial(&busy_mirror.args, Some(&others.gpus[0].stream)) }.unwrap();
                }
                group.enqueue(&plans, &mirrors);
            }
            group.step(&plans, &mirrors, &mut all);
            assert_eq!(judge(&case, &all).unwrap().failure, None);
            let bits: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
            assert!(bits[0] == bits[1], "ranks hold other bits");
            assert!(round == 0 || bits == first, "other bits in a second round");
            first = bits;
        }
        others.gpus[0].stream.synchronize().unwrap();
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}
