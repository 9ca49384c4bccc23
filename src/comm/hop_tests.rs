//! Steps and hops of local groups: under stress, and when ranks fail.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::local::{LocalRank, local_group_at};
use super::*;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::Epoch;

/// Long enough that only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);

fn config(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, setup_timeout: LONG, ..CommConfig::default() }
}

fn on_threads<T: Send>(ranks: Vec<LocalRank>, body: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
    let began = Instant::now();
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| body(rank))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    assert!(began.elapsed() < LONG);
    results
}

fn byte(rank: usize, step: u64, at: usize) -> u8 {
    (rank as u64 * 31 + step * 7 + at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
}

/// How many bytes a rank sends in a step.
fn size(rank: usize, step: u64) -> usize {
    (rank as u64 * 997 + step * 131) as usize % 5000
}

/// Hop `index` of a step: to the rank `shift` below, from the one `shift` above.
fn hop(rank: &LocalRank, step: u64, index: u32, shift: usize) -> Result<()> {
    let (me, world) = (rank.shard().rank as usize, rank.shard().world as usize);
    let (to, from) = ((me + world - shift % world) % world, (me + shift) % world);
    let send: Vec<u8> = (0..size(me, step)).map(|at| byte(me, step, at)).collect();
    let mut recv = vec![0; size(from, step)];
    let header = RoundHeader { fingerprint: step, fault: me as u64 + 5 };
    let message = Hop { index, to, from, header, until: Instant::now() + rank.step_timeout() };
    let mut ran = false;
    let fault = rank.hop(&message, &send, &mut recv, &mut || {
        ran = true;
        Ok(())
    })?;
    assert_eq!((fault, ran), (from as u64 + 5, true));
    assert!(recv.iter().enumerate().all(|(at, &found)| found == byte(from, step, at)), "rank {me}, step {step}");
    Ok(())
}

/// A step of several hops, and sometimes a round.
fn whole_step(rank: &LocalRank, step: u64) -> Result<()> {
    rank.open(step, CallWord::default())?;
    if step.is_multiple_of(3) {
        rank.round(RoundHeader { fingerprint: step, fault: 0 }, 64, &mut |_| (), &mut |_| ())?;
    }
    let world = rank.shard().world as usize;
    for index in 0..world.min(4) - 1 {
        hop(rank, step, index as u32, index + 1)?;
    }
    // Every rank hears of every other in a step: what the openings rely on.
    rank.round(RoundHeader { fingerprint: step, fault: 0 }, 8, &mut |_| (), &mut |_| ())
}

#[test]
fn every_message_arrives_as_it_was_sent_also_where_epochs_wrap() {
    for (world, steps, start) in [(2, 2000, 0), (3, 1500, u32::MAX - 700), (5, 800, 0), (16, 150, u32::MAX - 70)] {
        let ranks = local_group_at(world, &config(LONG), Epoch::from_flag(start)).unwrap();
        on_threads(ranks, |rank| {
            for step in 0..steps {
                whole_step(&rank, step).unwrap();
                if (step + rank.shard().rank as u64).is_multiple_of(97) {
                    std::thread::sleep(Duration::from_micros(300));
                }
            }
            rank
        });
    }
}

#[test]
fn a_hop_that_makes_no_sense_is_refused() {
    let ranks = local_group(2, &config(LONG)).unwrap();
    let header = RoundHeader { fingerprint: 1, fault: 0 };
    let message = Hop { index: 0, to: 2, from: 1, header, until: Instant::now() + LONG };
    let error = ranks[0].hop(&message, &[], &mut [], &mut || Ok(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn ranks_that_open_other_steps_are_found_out_whatever_they_wait_for() {
    for (world, odd) in [(2usize, 1usize), (3, 0), (4, 2), (8, 7)] {
        for way in 0..3 {
            let results = on_threads(local_group(world, &config(LONG)).unwrap(), |rank| {
                let me = rank.shard().rank as usize;
                for step in 0..5 {
                    whole_step(&rank, step).unwrap();
                }
                let other = me == odd;
                let failed =
                    rank.open(if other { 77 } else { 5 }, CallWord::default()).and_then(|()| match (way, other) {
                        // All hop; the odd one makes a round; the odd one hops among rounds.
                        (0, _) | (1, false) | (2, true) => {
                            (1..world).try_for_each(|i| hop(&rank, if other { 77 } else { 5 }, i as u32, 1))
                        }
                        _ => rank.round(RoundHeader { fingerprint: 5, fault: 0 }, 64, &mut |_| (), &mut |_| ()),
                    });
                let error = failed.unwrap_err();
                assert_eq!(rank.status().as_ref(), Some(&error));
                assert_eq!(whole_step(&rank, 6).unwrap_err(), error);
                (error, rank)
            });
            for (me, (error, _)) in results.iter().enumerate() {
                let wanted = if world == 2 { 1 - me } else { odd };
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(wanted as i32)), "{way}: {error}");
            }
        }
    }
}

#[test]
fn a_message_of_another_size_is_desync_between_the_two() {
    let results = on_threads(local_group(2, &config(LONG)).unwrap(), |rank| {
        rank.open(1, CallWord::default()).unwrap();
        let me = rank.shard().rank as usize;
        let header = RoundHeader { fingerprint: 1, fault: 0 };
        let message = Hop { index: 0, to: 1 - me, from: 1 - me, header, until: Instant::now() + LONG };
        (rank.hop(&message, &vec![0; 10 + me], &mut [0; 10], &mut || Ok(())), rank)
    });
    // Rank 0 finds it; rank 1 may have had what it wanted before.
    let error = results[0].0.as_ref().unwrap_err();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(1)));
    assert_eq!(results[1].1.status().unwrap().kind(), ErrorKind::Desync);
}

#[test]
fn the_rank_that_never_opens_is_named_by_those_who_wait_for_others() {
    let step = Duration::from_secs(1);
    let results = on_threads(local_group(5, &config(step)).unwrap(), |rank| {
        if rank.shard().rank == 3 {
            let began = Instant::now();
            while rank.status().is_none() {
                assert!(began.elapsed() < LONG);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let began = Instant::now();
        // Rank 2 waits for rank 3; rank 1 gets what it wants from rank 2, and waits in the next hop; and so on.
        let error =
            rank.open(1, CallWord::default()).and_then(|()| (0..4).try_for_each(|i| hop(&rank, 1, i, 1))).unwrap_err();
        (error, began.elapsed(), rank)
    });
    for (error, took, _) in results {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(3)), "{error}");
        assert!(took < step + Duration::from_secs(5), "{took:?}");
    }
}

#[test]
fn aborts_departures_and_errors_midway_end_every_wait() {
    for world in [2, 3, 6] {
        for fault in 0..4 {
            for at in [0u32, 1, 3] {
                let culprit = world / 2;
                let stopped = AtomicBool::new(false);
                let results = on_threads(local_group(world, &config(LONG)).unwrap(), |rank| {
                    let me = rank.shard().rank as usize;
                    for step in 0..3 {
                        whole_step(&rank, step).unwrap();
                    }
                    // Who is late finds the group broken.
                    if let Err(error) = rank.open(3, CallWord::default()) {
                        return Some((error, rank));
                    }
                    // What one rank does reaches the farthest in world - 1 hops.
                    for index in 0..4 + world as u32 {
                        if me == culprit && index == at {
                            stopped.store(true, Ordering::Relaxed);
                            match fault {
                                0 => rank.abort(),
                                1 => rank.fail(&Error::new(ErrorKind::System, "told to")),
                                2 => drop(rank),
                                _ => {
                                    let header = RoundHeader { fingerprint: 3, fault: 0 };
                                    let until = Instant::now() + LONG;
                                    let to = (me + world - 1) % world;
                                    let message = Hop { index, to, from: (me + 1) % world, header, until };
                                    let told = || Err(Error::new(ErrorKind::NoMemory, "nothing left"));
                                    rank.hop(&message, &[0; 9], &mut [], &mut &told).unwrap_err();
                                }
                            }
                            return None;
                        }
                        if let Err(error) = hop(&rank, 3, index, 1) {
                            return Some((error, rank));
                        }
                    }
                    None
                });
                let kinds = [ErrorKind::Aborted, ErrorKind::System, ErrorKind::PeerLost, ErrorKind::NoMemory];
                for (me, result) in results.into_iter().enumerate().filter(|(me, _)| *me != culprit) {
                    let (error, _) = result.unwrap_or_else(|| panic!("rank {me} of {world} went on"));
                    let wanted = (kinds[fault], Some(culprit as i32));
                    // A message that the culprit took back may have been seen to be of another size first.
                    let seen = (error.kind(), error.rank()) == (ErrorKind::Desync, wanted.1) && fault == 3;
                    assert!(
                        (error.kind(), error.rank()) == wanted || seen,
                        "fault {fault} at {at}, rank {me}: {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_panic_meanwhile_breaks_the_group_and_takes_the_message_back() {
    let opened = Barrier::new(2);
    let results = on_threads(local_group(2, &config(LONG)).unwrap(), |rank| {
        let open = rank.open(1, CallWord::default());
        // The panic breaks the group: whoever opens the step after it is refused.
        opened.wait();
        open.unwrap();
        if rank.shard().rank == 1 {
            // Never takes it: looks at the status only.
            let began = Instant::now();
            while rank.status().is_none() {
                assert!(began.elapsed() < LONG);
                std::thread::sleep(Duration::from_millis(1));
            }
            return rank;
        }
        let header = RoundHeader { fingerprint: 1, fault: 0 };
        let message = Hop { index: 0, to: 1, from: 1, header, until: Instant::now() + LONG };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            rank.hop(&message, &[1; 100], &mut [0; 100], &mut || panic!("meanwhile"))
        }));
        assert!(caught.is_err());
        rank
    });
    for rank in results {
        let error = rank.status().unwrap();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Internal, Some(0)));
    }
}

/// Faults are armed for the process; a rank that no other test has keeps them here.
#[cfg(feature = "fault-injection")]
#[test]
fn injected_faults_end_the_hop_on_every_rank() {
    const WORLD: usize = 22;
    for point in ["comm.post", "comm.hop", "comm.copied"] {
        for (action, kind) in [("panic", ErrorKind::Internal), ("fail", ErrorKind::NoMemory)] {
            crate::fault::arm(&format!("{point}#21={action}@3")).unwrap();
            let results = on_threads(local_group(WORLD, &config(LONG)).unwrap(), |rank| {
                let error = loop {
                    let call = std::panic::AssertUnwindSafe(|| {
                        rank.open(1, CallWord::default())
                            .and_then(|()| (0..4).try_for_each(|i| hop(&rank, 1, i, 1 + i as usize * 5)))
                    });
                    match std::panic::catch_unwind(call) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => break error,
                        Err(_) => break rank.status().unwrap(),
                    }
                };
                (error, rank)
            });
            for (error, rank) in results {
                let status = rank.status().unwrap();
                assert_eq!((error.kind(), status.kind(), status.rank()), (kind, kind, Some(21)), "{point} {action}");
            }
        }
    }
}
