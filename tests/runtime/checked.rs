//! Plans with the flag CHECKED: ranks that were passed what does not fit together find it out in the step, whatever the
//! algorithm, and go on.

use std::time::Duration;

use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, MaskKind, OutputMode, Placement, Tensor};
use treeattn::runtime::{Communicator, Plan, Stream};
use treeattn::{Error, ErrorKind};

use super::group::*;

const WORLD: usize = 3;
const BATCH: usize = 3;
/// Tokens of all ranks together of each sequence; the query's among them.
const LENGTH: i32 = 20;

/// What one rank passes.
struct Input {
    shard: Shard,
    placement: Placement,
    global_length: Vec<i32>,
    kv_start: Vec<i32>,
    kv_position: Vec<i32>,
    query_start: Vec<i32>,
    query_position: Option<Vec<i32>>,
    /// The bytes of a boolean mask of one row.
    mask: Option<Vec<u8>>,
    /// Whether `global_length` is passed.
    is_length_given: bool,
}

const STRIDE: usize = 64;

impl Input {
    fn new(desc: &AttentionDesc, rank: usize) -> Input {
        // Ranks hold 7, 7 and 6 tokens; in turn where they are interleaved.
        let (begin, keys) = ([0, 7, 14][rank], [7, 7, 6][rank]);
        let mut kv_position = vec![-1; BATCH * STRIDE];
        for b in 0..BATCH {
            for slot in 0..keys {
                // From the last position down.
                kv_position[b * STRIDE + slot] = LENGTH - 1 - (WORLD * slot + rank) as i32;
            }
        }
        Input {
            shard: Shard::new(desc, BATCH, keys as i32, rank as u32),
            placement: desc.placement,
            global_length: vec![LENGTH; BATCH],
            kv_start: vec![begin; BATCH],
            kv_position,
            query_start: (0..=BATCH as i32).collect(),
            query_position: None,
            mask: (desc.mask == MaskKind::Boolean).then(|| vec![1; STRIDE]),
            is_length_given: true,
        }
    }

    fn args(&mut self) -> DecodeArgs {
        let mut args = DecodeArgs {
            global_length: if self.is_length_given { self.global_length.as_ptr() } else { std::ptr::null() },
            query_start: self.query_start.as_ptr(),
            query_position: self.query_position.as_ref().map_or(std::ptr::null(), |positions| positions.as_ptr()),
            mask: self.mask.as_ref().map_or(Tensor::NULL, |mask| Tensor::from_slice(mask).with_strides([0, 0, 0, 1])),
            ..self.shard.args(BATCH)
        };
        match self.placement {
            Placement::Contiguous => args.kv_start = self.kv_start.as_ptr(),
            Placement::Interleaved { .. } => {}
            Placement::Explicit => {
                (args.kv_position, args.kv_position_stride) = (self.kv_position.as_ptr(), STRIDE as i64);
            }
        }
        args
    }
}

const CONTIGUOUS: Placement = Placement::Contiguous;
const INTERLEAVED: Placement = Placement::Interleaved { run: 1 };

fn desc(algorithm: Algorithm, placement: Placement, causal: bool) -> AttentionDesc {
    AttentionDesc { algorithm, placement, causal, checked: true, ..shape() }
}

/// The outputs of a step on all ranks, each with its error.
fn step(
    comms: &[Communicator],
    plans: &[Plan],
    change: impl Fn(usize, &mut Input) + Sync,
) -> Vec<(Vec<f32>, Option<Error>)> {
    on_threads(comms.len(), |rank| {
        let mut input = Input::new(plans[rank].desc(), rank);
        change(rank, &mut input);
        // SAFETY: the input outlives the blocking call.
        let error = unsafe { plans[rank].decode(&input.args(), None) }.err();
        (input.shard.out, error)
    })
}

/// What one rank passes otherwise than it should.
struct Wrong {
    what: &'static str,
    placement: Placement,
    change: fn(&mut Input),
    argument: &'static str,
    is_rank_known: bool,
    /// Whether the query tokens of the last sequence are others, too.
    is_last_wrong_too: bool,
}

const WRONG: [Wrong; 15] = [
    Wrong {
        what: "a bit of q",
        placement: CONTIGUOUS,
        change: |input| input.shard.q[64 + 17] = f32::from_bits(input.shard.q[64 + 17].to_bits() ^ 1),
        argument: "q: found other bits",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "heads of q the other way round",
        placement: INTERLEAVED,
        change: |input| input.shard.q[64..96].rotate_left(16),
        argument: "q: found other bits",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a longer sequence",
        placement: INTERLEAVED,
        change: |input| input.global_length[1] += 3,
        argument: "global_length: found another length",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a stale kv_length",
        placement: CONTIGUOUS,
        change: |input| input.shard.length[1] -= 1,
        argument: "kv_length, kv_start or kv_position: found a position that no rank holds",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a stale kv_length of a rank in turn",
        placement: INTERLEAVED,
        change: |input| input.shard.length[1] -= 1,
        argument: "kv_length, kv_start or kv_position: found a position that no rank holds",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a start that is another rank's",
        placement: CONTIGUOUS,
        change: |input| input.kv_start[1] = 0,
        argument: "kv_length, kv_start or kv_position: found a position that is held twice",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a position twice",
        placement: Placement::Explicit,
        change: |input| input.kv_position[STRIDE + 2] = input.kv_position[STRIDE + 1],
        argument: "kv_length, kv_start or kv_position: found a position that is held twice",
        is_rank_known: false,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a key too few",
        placement: Placement::Explicit,
        change: |input| input.shard.length[1] -= 1,
        argument: "kv_length, kv_start or kv_position: found a position that no rank holds",
        is_rank_known: false,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "another split of the queries",
        placement: INTERLEAVED,
        change: |input| input.query_start[1..3].copy_from_slice(&[1, 1]),
        argument: "query_start: found other query tokens",
        is_rank_known: true,
        is_last_wrong_too: true,
    },
    Wrong {
        what: "fewer queries, with padding rows that are not padding for the others",
        placement: CONTIGUOUS,
        change: |input| input.query_start[1..].copy_from_slice(&[1, 1, 1]),
        argument: "query_start: found other query tokens",
        is_rank_known: true,
        is_last_wrong_too: true,
    },
    Wrong {
        what: "queries where the others have padding rows",
        placement: Placement::Explicit,
        change: |input| input.query_start[1..].copy_from_slice(&[1, 3, 3]),
        argument: "query_start: found other query tokens",
        is_rank_known: true,
        is_last_wrong_too: true,
    },
    Wrong {
        what: "a query position",
        placement: INTERLEAVED,
        change: |input| input.query_position = Some(vec![LENGTH - 1, LENGTH - 2, LENGTH - 1]),
        argument: "query_position: found other positions",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a kv_length that was not rolled back",
        placement: INTERLEAVED,
        change: |input| input.shard.length[1] += 1,
        argument: "kv_length, kv_start or kv_position: found a key at or beyond global_length",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a start past the end",
        placement: CONTIGUOUS,
        change: |input| input.kv_start[1] = LENGTH - 1,
        argument: "kv_length, kv_start or kv_position: found a key at or beyond global_length",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
    Wrong {
        what: "a position past the end",
        placement: Placement::Explicit,
        change: |input| input.kv_position[STRIDE + 2] = LENGTH,
        argument: "kv_length, kv_start or kv_position: found a key at or beyond global_length",
        is_rank_known: true,
        is_last_wrong_too: false,
    },
];

#[test]
fn ranks_that_do_not_fit_together_say_so_and_go_on() {
    let masked = ALGORITHMS.into_iter().map(|algorithm| (algorithm, MaskKind::None)).chain(
        // The blocks of a ring hold masks, whose size depends on the query tokens.
        [(Algorithm::Ring, MaskKind::Boolean)],
    );
    for (n, (algorithm, mask)) in masked.enumerate() {
        let (_runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
        for (m, wrong) in WRONG.iter().enumerate() {
            let desc = AttentionDesc { mask, ..desc(algorithm, wrong.placement, m % 2 == 0) };
            let plans = plan_all(&comms, &desc);
            let good = step(&comms, &plans, |_, _| {});
            assert!(good.iter().all(|(out, error)| error.is_none() && *out == good[0].0), "{}: {good:?}", wrong.what);
            // Of two who share positions the later one is blamed, so that it is not rank 0 that is changed.
            let at = 1 + (n + m) % (WORLD - 1);
            let found = step(&comms, &plans, |rank, input| {
                if wrong.what == "a query position" {
                    input.query_position = Some(vec![LENGTH - 1; BATCH]);
                }
                if rank == at {
                    (wrong.change)(input);
                }
            });
            for (rank, (out, error)) in found.iter().enumerate() {
                let error =
                    error.as_ref().unwrap_or_else(|| panic!("{algorithm:?}, {}: rank {rank} is OK", wrong.what));
                assert_eq!(error.kind(), ErrorKind::Mismatch, "{algorithm:?}, {}: {error}", wrong.what);
                assert!(error.message().starts_with(wrong.argument), "{algorithm:?}, {}: {error}", wrong.what);
                assert_eq!(
                    error.rank(),
                    wrong.is_rank_known.then_some(at as i32),
                    "{algorithm:?}, {}: {error}",
                    wrong.what
                );
                assert!(error.message().contains("sequence 1 on "), "{error}");
                let (before, rest) = out.split_at(64);
                let (middle, after) = rest.split_at(64);
                assert!(middle.iter().all(|x| x.is_nan()), "{algorithm:?}, {}: {middle:?}", wrong.what);
                assert_eq!(before, &good[0].0[..64], "{algorithm:?}, {}", wrong.what);
                if wrong.is_last_wrong_too {
                    assert!(after.iter().all(|x| x.is_nan()), "{algorithm:?}, {}: {after:?}", wrong.what);
                } else {
                    assert_eq!(after, &good[0].0[128..], "{algorithm:?}, {}", wrong.what);
                }
            }
            let again = step(&comms, &plans, |_, _| {});
            assert_eq!(again, good, "{algorithm:?}, {}", wrong.what);
            assert!(comms.iter().all(|comm| comm.status().unwrap().error.is_none()));
        }
    }
}

#[test]
fn what_is_checked_changes_no_bit_and_needs_lengths_and_starts() {
    let (_runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
    for output in [OutputMode::Replicated, OutputMode::Local] {
        let desc = AttentionDesc { output, ..desc(Algorithm::OneShot, CONTIGUOUS, false) };
        let checked = step(&comms, &plan_all(&comms, &desc), |_, _| {});
        let plain = step(&comms, &plan_all(&comms, &AttentionDesc { checked: false, ..desc }), |_, _| {});
        assert_eq!(checked, plain, "{output:?}");
    }
    let plans = plan_all(&comms, &desc(Algorithm::OneShot, CONTIGUOUS, false));
    let mut input = Input::new(plans[0].desc(), 0);
    let args = input.args();
    for (args, argument) in [
        (DecodeArgs { global_length: std::ptr::null(), ..args }, "global_length: found NULL"),
        (DecodeArgs { kv_start: std::ptr::null(), ..args }, "kv_start: found NULL"),
    ] {
        // SAFETY: refused before anything runs.
        let error = unsafe { plans[0].decode(&args, None) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.message().starts_with(argument), "{error}");
    }
}

/// Positions that are passed are the same as those that follow from the lengths, whichever rank passes them.
#[test]
fn positions_may_be_passed_by_some_ranks_alone() {
    let (_runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
    for causal in [false, true] {
        let plans = plan_all(&comms, &desc(Algorithm::OneShot, CONTIGUOUS, causal));
        let good = step(&comms, &plans, |_, _| {});
        let some = step(&comms, &plans, |rank, input| {
            input.query_position = (rank == 1).then(|| vec![LENGTH - 1; BATCH]);
        });
        assert!(good == some && some.iter().all(|(_, error)| error.is_none()), "{some:?}");
    }
}

/// Surplus keys do not count, but where queries see them.
#[test]
fn surplus_keys_that_queries_see_are_held_once() {
    const COMMITTED: i32 = LENGTH - 3;
    let (_runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
    for (algorithm, placement) in [
        (Algorithm::OneShot, CONTIGUOUS),
        (Algorithm::Ring, CONTIGUOUS),
        (Algorithm::OneShot, INTERLEAVED),
        (Algorithm::OneShot, Placement::Explicit),
    ] {
        let plain = desc(algorithm, placement, true);
        let wanted = step(&comms, &plan_all(&comms, &plain), |_, _| {});
        let plans = plan_all(&comms, &AttentionDesc { surplus_keys: true, ..plain });
        // The rank that holds the last position, and whether it loses it.
        let last = [1, 2][usize::from(placement == CONTIGUOUS)];
        let run = |query: i32, loses: bool| {
            step(&comms, &plans, |rank, input| {
                input.global_length.fill(COMMITTED);
                input.query_position = Some(vec![query; BATCH]);
                let at = if placement == Placement::Explicit { 0 } else { last };
                if loses && rank == at {
                    // With explicit placement slot 0 of rank 0 holds the last position.
                    match placement {
                        Placement::Explicit => input.kv_position[STRIDE] = LENGTH + 7,
                        _ => input.shard.length[1] -= 1,
                    }
                }
            })
        };
        assert_eq!(run(LENGTH - 1, false), wanted, "{placement:?}");
        assert!(run(COMMITTED - 1, true).iter().all(|(_, error)| error.is_none()), "nobody sees it");
        let found = run(LENGTH - 1, true);
        if placement == Placement::Explicit {
            // Which of them are there is not looked at: several may have one position.
            assert!(found.iter().all(|(_, error)| error.is_none()), "{found:?}");
            continue;
        }
        for (out, error) in &found {
            let error = error.as_ref().expect("a key is lost");
            assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(last as i32)), "{error}");
            assert!(error.message().contains("found a position that no rank holds"), "{error}");
            assert!(out[64..128].iter().all(|x| x.is_nan()) && out[..64] == wanted[0].0[..64], "{placement:?}");
        }
    }
}

/// Bad data of a rank is told as such, not as a disagreement; a mismatch on a stream is told by `synchronize`, once.
#[test]
fn bad_data_comes_first_and_streams_tell_of_a_mismatch() {
    let (runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
    let plans = plan_all(&comms, &desc(Algorithm::TwoShot, CONTIGUOUS, true));
    let found = step(&comms, &plans, |rank, input| {
        if rank == 1 {
            input.shard.length[0] = 65;
            input.shard.q[64] += 1.0;
        }
    });
    assert!(found.iter().all(|(_, error)| error.as_ref().unwrap().kind() == ErrorKind::InvalidData), "{found:?}");
    assert!(
        found.iter().all(|(out, _)| out[..128].iter().all(|x| x.is_nan()) && out[128..].iter().all(|x| !x.is_nan()))
    );
    let streams: Vec<_> = comms.iter().map(|_| Stream::new(&runtime, CPU).unwrap()).collect();
    let mut inputs: Vec<_> = (0..WORLD).map(|rank| Input::new(plans[rank].desc(), rank)).collect();
    inputs[2].global_length[2] = LENGTH - 1;
    for ((plan, stream), input) in plans.iter().zip(&streams).zip(&mut inputs) {
        // SAFETY: the inputs live until the streams are synchronised.
        unsafe { plan.decode(&input.args(), Some(stream)) }.unwrap();
    }
    for (comm, stream) in comms.iter().zip(&streams) {
        let error = stream.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(2)), "{error}");
        assert!(comm.status().unwrap().error.is_none());
        stream.synchronize().unwrap();
    }
}

/// Records that no round has room for travel in several; they are part of what a plan says it holds.
#[test]
fn a_batch_larger_than_a_round_is_checked_whole() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let described = comms[0].describe().unwrap();
    let (_, capacity) = described.split_once("\"capacity_bytes\":").unwrap();
    let digits: String = capacity.trim_start().chars().take_while(char::is_ascii_digit).collect();
    let batch = digits.parse::<usize>().unwrap() / 64 + 5;
    let desc = AttentionDesc {
        max_batch: batch as i32,
        max_query_tokens: batch as i32,
        checked: true,
        ..AttentionDesc::new(1, 1, 4, 2)
    };
    let plans = plan_all(&comms, &desc);
    let plain = plan_all(&comms, &AttentionDesc { checked: false, ..desc });
    let more = plans[0].memory().unwrap().workspace - plain[0].memory().unwrap().workspace;
    assert_eq!(more, (batch * (64 * (1 + 2) + 24)) as u64);
    for wrong in [None, Some(batch - 2)] {
        let errors = on_threads(2, |rank| {
            let mut shard = Shard::new(&desc, batch, 2, rank as u32);
            if let (Some(wrong), 1) = (wrong, rank) {
                shard.length[wrong] = 1;
            }
            let (lengths, starts) = (vec![4; batch], vec![2 * rank as i32; batch]);
            let args = DecodeArgs { global_length: lengths.as_ptr(), kv_start: starts.as_ptr(), ..shard.args(batch) };
            // SAFETY: everything outlives the blocking call.
            unsafe { plans[rank].decode(&args, None) }.err()
        });
        for error in errors {
            let message = error.map(|error| error.message().to_string());
            assert_eq!(message.is_some(), wrong.is_some(), "{message:?}");
            assert!(message.is_none_or(|message| message.contains(&format!("sequence {} on rank 1", batch - 2))));
        }
    }
}

/// In a ring the keys of one rank meet the positions of the queries that another was passed: what is wrong with those is bad
/// data of that rank, whether it has keys or not.
#[test]
fn bad_positions_on_one_rank_are_bad_data_in_a_ring() {
    let (_runtime, comms) = group(WORLD, &quick(Duration::from_secs(20)));
    for placement in [CONTIGUOUS, INTERLEAVED, Placement::Explicit] {
        let desc = AttentionDesc { checked: false, ..desc(Algorithm::Ring, placement, true) };
        let plans = plan_all(&comms, &desc);
        let good = step(&comms, &plans, |_, _| {});
        for has_keys in [true, false] {
            for argument in ["query_position", "global_length"] {
                if has_keys && argument == "global_length" {
                    continue; // Keys above it are refused before the step.
                }
                let found = step(&comms, &plans, |rank, input| {
                    if argument == "query_position" {
                        input.query_position = Some(vec![LENGTH - 1; BATCH]);
                    }
                    if rank == 1 {
                        match &mut input.query_position {
                            Some(positions) => positions[1] = -1,
                            None => input.global_length[1] = 0,
                        }
                        // Without any length that keys are held against, ranks may have none.
                        input.shard.length[1] = if has_keys { input.shard.length[1] } else { 0 };
                        input.is_length_given = placement == CONTIGUOUS || argument == "global_length";
                    }
                });
                for (rank, (out, error)) in found.iter().enumerate() {
                    let error =
                        error.as_ref().unwrap_or_else(|| panic!("{placement:?}, {argument}: rank {rank} is OK"));
                    assert_eq!((error.kind(), error.rank()), (ErrorKind::InvalidData, Some(1)), "{error}");
                    let value = if rank == 1 { "[1]: found " } else { ": found a value out of range in sequence 1" };
                    assert!(error.message().starts_with(&format!("{argument}{value}")), "{error}");
                    assert!(out[64..128].iter().all(|x| x.is_nan()), "{placement:?}, {argument}");
                    assert_eq!((&out[..64], &out[128..]), (&good[0].0[..64], &good[0].0[128..]), "{placement:?}");
                }
                assert_eq!(step(&comms, &plans, |_, _| {}), good);
            }
        }
    }
}
