//! Plans with the flag CHECKED: a step whose inputs disagree between ranks says so, and the communicator stays usable.

use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Placement};
use treeattn::runtime::Plan;

use super::{LONG, counts};
use crate::driver::Current;
use crate::group::{Group, OwnStream, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::rng::Rng;
use crate::support::run::{self, judge};
use crate::support::seed;
use crate::support::values::Values;

const CONTIGUOUS: Placement = Placement::Contiguous;
const INTERLEAVED: Placement = Placement::Interleaved { run: 1 };
const EXPLICIT: Placement = Placement::Explicit;
const HEADS: usize = 4;
const DIM: usize = 64;

fn desc(placement: Placement) -> AttentionDesc {
    let base = shape(HEADS as i32, 2, DIM as i32, Dtype::F16);
    AttentionDesc { out_dtype: Dtype::F32, checked: true, placement, ..base }
}

/// Changes a bit of q of the second token.
fn change_query(rank: &mut Rank) {
    rank.q.thaw();
    rank.q.bytes_mut()[2 * (HEADS * DIM + 33)] ^= 1;
    rank.q.freeze();
}

/// The int32 input's entry.
fn entry(rank: &mut Rank, which: Ints, index: usize) -> i32 {
    let bytes = &rank.ints(which).bytes()[index * 4..][..4];
    i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn add(rank: &mut Rank, which: Ints, index: usize, by: i32) {
    let value = entry(rank, which, index);
    rank.set(which, index, value + by);
}

/// What one rank is passed wrongly for sequence 1.
struct Wrong {
    placement: Placement,
    change: fn(&Case, &mut Rank),
    message: &'static str,
    /// Where no rank can be blamed the error names none.
    is_rank_known: bool,
}

const TWICE: &str = "kv_length, kv_start or kv_position: found a position that is held twice";
const MISSING: &str = "kv_length, kv_start or kv_position: found a position that no rank holds";
const OUTSIDE: &str = "kv_length, kv_start or kv_position: found a key at or beyond global_length";

const WRONG: [Wrong; 12] = [
    Wrong {
        placement: CONTIGUOUS,
        change: |_, rank| change_query(rank),
        message: "q: found other bits",
        is_rank_known: true,
    },
    Wrong {
        placement: INTERLEAVED,
        change: |_, rank| add(rank, Ints::GlobalLength, 1, 3),
        message: "global_length: found another length",
        is_rank_known: true,
    },
    Wrong {
        placement: CONTIGUOUS,
        change: |_, rank| add(rank, Ints::KvLength, 1, -1),
        message: MISSING,
        is_rank_known: true,
    },
    Wrong {
        placement: INTERLEAVED,
        change: |_, rank| add(rank, Ints::KvLength, 1, -1),
        message: MISSING,
        is_rank_known: true,
    },
    Wrong {
        placement: CONTIGUOUS,
        change: |_, rank| rank.set(Ints::KvStart, 1, 0),
        message: TWICE,
        is_rank_known: true,
    },
    Wrong {
        placement: EXPLICIT,
        change: |case, rank| {
            let slot = case.desc.max_kv_length as usize;
            let position = entry(rank, Ints::KvPosition, slot + 1);
            rank.set(Ints::KvPosition, slot + 2, position);
        },
        message: TWICE,
        is_rank_known: false,
    },
    Wrong {
        placement: EXPLICIT,
        change: |_, rank| add(rank, Ints::KvLength, 1, -1),
        message: MISSING,
        is_rank_known: false,
    },
    Wrong {
        placement: EXPLICIT,
        change: |case, rank| rank.set(Ints::KvPosition, case.desc.max_kv_length as usize + 2, 20),
        message: OUTSIDE,
        is_rank_known: true,
    },
    Wrong {
        placement: INTERLEAVED,
        change: |_, rank| add(rank, Ints::KvLength, 1, 1),
        message: OUTSIDE,
        is_rank_known: true,
    },
    Wrong {
        placement: CONTIGUOUS,
        change: |_, rank| add(rank, Ints::KvStart, 1, 1),
        message: OUTSIDE,
        is_rank_known: true,
    },
    Wrong {
        placement: INTERLEAVED,
        change: |_, rank| rank.set(Ints::QueryStart, 2, 1),
        message: "query_start: found other query tokens",
        is_rank_known: true,
    },
    // Rows that are padding on one rank are not for the others.
    Wrong {
        placement: CONTIGUOUS,
        change: |_, rank| (2..4).for_each(|b| rank.set(Ints::QueryStart, b, 1)),
        message: "query_start: found other query tokens",
        is_rank_known: true,
    },
];

/// Every rank is told once that its inputs of sequence `b` disagree with others', and no communicator breaks.
fn told(group: &Group, b: i32, rank: Option<i32>, message: &str) {
    for comm in &group.comms {
        let status = comm.status().unwrap();
        let error = status.error.unwrap_or_else(|| panic!("{message}: not told"));
        assert_eq!((error.kind(), error.rank(), status.sequence), (ErrorKind::Mismatch, rank, b), "{message}: {error}");
        assert!(error.message().starts_with(message), "{message}: {error}");
        assert!(comm.status().unwrap().error.is_none(), "{message}: told twice");
    }
}

/// A step after which rows of the sequences in `wrong` are NaN, and those of all others as in `wanted`.
fn is_nan_in(case: &Case, ranks: &[Rank], wrong: &[usize], wanted: &[Vec<u32>]) {
    for (rank, wanted) in ranks.iter().zip(wanted) {
        let width = rank.heads.len() * (DIM + 1);
        for (token, (found, wanted)) in rank.bits(case).chunks(width).zip(wanted.chunks(width)).enumerate() {
            match case.owner(token).is_some_and(|b| wrong.contains(&b)) {
                true => assert!(found.iter().all(|&bits| f32::from_bits(bits).is_nan()), "token {token}: {found:?}"),
                false => assert_eq!(found, wanted, "token {token}"),
            }
        }
    }
}

fn bits(case: &Case, ranks: &[Rank]) -> Vec<Vec<u32>> {
    ranks.iter().map(|rank| rank.bits(case)).collect()
}

/// Each kind of disagreement, between two steps without one; with each exchange in turn.
pub fn disagreements() {
    const WAYS: [(Algorithm, OutputMode); 3] = [
        (Algorithm::OneShot, OutputMode::Replicated),
        (Algorithm::TwoShot, OutputMode::Replicated),
        (Algorithm::Auto, OutputMode::Scattered),
    ];
    let groups: Vec<Group> = counts().into_iter().map(|on| Group::over(3, on, LONG)).collect();
    for (n, wrong) in WRONG.iter().enumerate() {
        let (group, (algorithm, output)) = (&groups[n % groups.len()], WAYS[n % WAYS.len()]);
        let desc = AttentionDesc { algorithm, output, causal: n % 2 == 1, ..desc(wrong.placement) };
        // Room for a key more of the second.
        let case = Case::plain(desc, 3, &[(20, 1), (20, 1), (30, 1)], Values::Normal, n as u64);
        let mut all = ranks(&case);
        let plain = group.plans(&AttentionDesc { checked: false, ..case.desc });
        group.step(&plain, &group.mirrors(&all), &mut all);
        let wanted = bits(&case, &all);
        assert_eq!(judge(&case, &all).unwrap().failure, None);
        drop(plain);
        let plans = group.plans(&case.desc);
        // Of two who share positions the later one is blamed, so that it is not rank 0 that is changed.
        let at = 1 + n % 2;
        for is_wrong in [false, true, false] {
            let mut all = ranks(&case);
            if is_wrong {
                (wrong.change)(&case, &mut all[at]);
            }
            group.step(&plans, &group.mirrors(&all), &mut all);
            if !is_wrong {
                assert!(bits(&case, &all) == wanted, "{}: other bits", wrong.message);
                assert!(group.errors().into_iter().flatten().next().is_none(), "{}", wrong.message);
                continue;
            }
            told(group, 1, wrong.is_rank_known.then_some(at as i32), wrong.message);
            // Where the second sequence owns other rows, so does the third.
            let others: &[usize] = if wrong.message.starts_with("query_start") { &[1, 2] } else { &[1] };
            is_nan_in(&case, &all, others, &wanted);
        }
    }
    counts().into_iter().for_each(rollback_that_one_rank_missed);
}

/// Ranks that hold 8 and 2 of 10 tokens, in turn.
fn rollback_that_one_rank_missed(on: usize) {
    let group = Group::over(2, on, LONG);
    let case = Case::plain(desc(INTERLEAVED), 2, &[(10, 1), (24, 1)], Values::Normal, 5);
    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
    group.step(&plans, &group.mirrors(&all), &mut all);
    let wanted = bits(&case, &all);
    all[0].set(Ints::KvLength, 0, 8);
    all[1].set(Ints::KvLength, 0, 2);
    group.step(&plans, &group.mirrors(&all), &mut all);
    told(&group, 0, Some(0), OUTSIDE);
    is_nan_in(&case, &all, &[0], &wanted);
}

/// Ranks with one or two random differences are told what CPU ranks are told of the same.
pub fn like_cpus(count: u64) {
    const WORLD: usize = 3;
    let mut rng = Rng::new(seed() ^ 0xc4ec);
    let group = Group::over(WORLD, *counts().last().unwrap(), LONG);
    let cpus = run::Group::new(treeattn::cpu::Isa::best().name(), WORLD, 1);
    let mut found = 0;
    for n in 0..count {
        let placement = [CONTIGUOUS, INTERLEAVED, Placement::Interleaved { run: 3 }, EXPLICIT][n as usize % 4];
        let lengths = [rng.range(1, 20), rng.range(1, 20), 30];
        let sequences = lengths.map(|length| (length, 1));
        let desc = AttentionDesc { causal: rng.chance(50), ..desc(placement) };
        let desc = AttentionDesc { surplus_keys: desc.causal && rng.chance(50), ..desc };
        let mut case = Case::plain(desc, WORLD, &sequences, Values::Normal, n);
        // At the end of the sequence or, where surplus keys may be seen, past it.
        case.query_position =
            rng.chance(50).then(|| lengths.map(|length| (length + rng.range(0, 2)) as i32 - 1).to_vec());
        let mut all = ranks(&case);
        for _ in 0..rng.range(0, 2) {
            let (at, b) = (rng.range(0, WORLD - 1), rng.range(0, 2));
            let (rank, longest) = (&mut all[at], case.sequences.iter().map(|s| s.held[at].len()).max().unwrap_or(0));
            let held = entry(rank, Ints::KvLength, b);
            match rng.range(0, 5) {
                0 => change_query(rank),
                1 => add(rank, Ints::GlobalLength, b, 1),
                2 => rank.set(Ints::KvLength, b, (held - rng.range(0, 2) as i32).max(0)),
                3 => rank.set(Ints::KvLength, b, (held + 1).min(longest as i32)),
                4 => rank.set(Ints::KvStart, b, rng.range(0, lengths[b] + 2) as i32),
                _ if placement == EXPLICIT && held > 0 => {
                    let slot = b * case.desc.max_kv_length as usize + rng.range(0, held as usize - 1);
                    rank.set(Ints::KvPosition, slot, rng.range(0, lengths[b] + 1) as i32);
                }
                _ => {}
            }
        }
        // Slots that were not held have positions, too.
        if placement == EXPLICIT {
            for slot in 0..3 * case.desc.max_kv_length as usize {
                for rank in &mut all {
                    if entry(rank, Ints::KvPosition, slot) < 0 {
                        rank.set(Ints::KvPosition, slot, 1);
                    }
                }
            }
        }
        let plans = group.plans(&case.desc);
        group.step(&plans, &group.mirrors(&all), &mut all);
        let on_gpus: Vec<_> = group.comms.iter().map(|comm| comm.status().unwrap()).collect();
        let plans = cpus.plans(&case.desc).unwrap();
        let on_cpus = run::step(&cpus, &plans, &all, false, run::Call::Decode);
        for (gpu, cpu) in on_gpus.iter().zip(&on_cpus) {
            let words = |error: Option<&treeattn::Error>| error.map(|e| (e.kind(), e.rank(), e.message().to_string()));
            assert_eq!(words(gpu.error.as_ref()), words(cpu.as_ref().err()), "case {n}, {placement:?}, {lengths:?}");
            found += u64::from(cpu.is_err());
        }
    }
    assert!(count < 20 || found > count / 2 && found < 3 * count, "{found} of {count}: some fit together, some do not");
}

/// Bad data of a rank is told as such, not as a disagreement.
pub fn bad_data() {
    for on in counts() {
        let group = Group::over(3, on, LONG);
        for placement in [CONTIGUOUS, EXPLICIT] {
            let desc = AttentionDesc { causal: true, ..desc(placement) };
            let case = Case::plain(desc, 3, &[(20, 1), (20, 1), (30, 1)], Values::Normal, 3);
            let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
            group.step(&plans, &group.mirrors(&all), &mut all);
            let wanted = bits(&case, &all);
            change_query(&mut all[1]);
            match placement {
                EXPLICIT => all[2].set(Ints::KvPosition, case.desc.max_kv_length as usize, -1),
                _ => all[2].set(Ints::KvLength, 1, -3),
            }
            group.step(&plans, &group.mirrors(&all), &mut all);
            for comm in &group.comms {
                let status = comm.status().unwrap();
                assert_eq!(status.error.map(|error| error.kind()), Some(ErrorKind::InvalidData), "{placement:?}");
                assert_eq!((status.rank, status.sequence), (2, 1));
            }
            is_nan_in(&case, &all, &[1], &wanted);
        }
    }
}

/// Captured once, replayed over lengths that agree and over lengths that do not, across the wrap of epochs.
pub fn replays() {
    for on in counts() {
        let group = Group::starting_at(2, on, LONG, u32::MAX - 12);
        let case = Case::plain(desc(CONTIGUOUS), 2, &[(60, 1), (33, 2)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        assert_eq!(judge(&case, &all).unwrap().failure, None);
        let wanted = bits(&case, &all);
        let _current = Current::new(0);
        let lanes: Vec<OwnStream> = group.gpus.iter().map(OwnStream::new).collect();
        let graphs: Vec<_> = (0..2)
            .map(|rank: usize| {
                let (_current, lane) = (Current::new(lanes[rank].ordinal), &lanes[rank]);
                lane.raw.capture(|| {
                    for _ in 0..2 {
                        // SAFETY: the device memory outlives the replays, which are waited for.
                        unsafe { plans[rank].decode(&mirrors[rank].args, Some(&lane.stream)) }.unwrap();
                    }
                })
            })
            .collect();
        for round in 0..6 {
            let is_wrong = round % 2 == 1;
            if round > 0 {
                add(&mut all[1], Ints::KvLength, 1, if is_wrong { -1 } else { 1 });
            }
            for (mirror, rank) in mirrors.iter().zip(&mut all) {
                rank.prefill(0x11);
                mirror.update_all(rank);
            }
            for (graph, lane) in graphs.iter().zip(&lanes) {
                graph.replay(&lane.raw);
            }
            lanes.iter().for_each(|lane| lane.raw.synchronize());
            mirrors.iter().zip(&mut all).for_each(|(mirror, rank)| mirror.fetch(rank));
            if is_wrong {
                told(&group, 1, Some(1), MISSING);
            }
            is_nan_in(&case, &all, if is_wrong { &[1] } else { &[] }, &wanted);
            assert!(group.errors().into_iter().flatten().next().is_none(), "round {round}");
        }
    }
}

/// A rank that does not come breaks the communicator by the deadline, as without the check.
pub fn a_rank_that_does_not_come() {
    for on in counts() {
        let case = Case::plain(desc(INTERLEAVED), 3, &[(50, 1)], Values::Normal, 5);
        let group = Group::over(3, on, Duration::from_millis(500));
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        for _ in 0..2 {
            for rank in [0, 2] {
                // SAFETY: the device memory outlives the step, which is waited for.
                unsafe { plans[rank].decode(&mirrors[rank].args, Some(&group.gpus[rank].stream)) }.unwrap();
            }
        }
        for rank in [0, 2] {
            let error = group.gpus[rank].stream.synchronize().unwrap_err();
            assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
            mirrors[rank].fetch(&mut all[rank]);
            assert!(all[rank].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
        }
    }
}

/// A batch of more records than a slot holds: the last sequence is looked at like the first.
pub fn slotfuls() {
    // A slot of two ranks holds 1 MiB.
    const BATCH: usize = (1 << 20) / 64 + 5;
    let base = AttentionDesc { out_dtype: Dtype::F32, checked: true, ..shape(1, 1, 64, Dtype::F16) };
    for on in counts() {
        let group = Group::over(2, on, LONG);
        let case = Case::plain(base, 2, &[(4, 1); BATCH], Values::Normal, 3);
        let (mut all, plans): (_, Vec<Plan>) = (ranks(&case), group.plans(&case.desc));
        group.step(&plans, &group.mirrors(&all), &mut all);
        let wanted = bits(&case, &all);
        assert!(group.errors().into_iter().flatten().next().is_none());
        for b in [BATCH - 1, 0] {
            all[1].set(Ints::KvStart, b, 1);
            group.step(&plans, &group.mirrors(&all), &mut all);
            told(&group, b as i32, Some(1), TWICE);
            let wrong = if b == 0 { vec![0, BATCH - 1] } else { vec![b] };
            is_nan_in(&case, &all, &wrong, &wanted);
        }
    }
}
