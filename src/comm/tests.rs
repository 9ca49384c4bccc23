//! Local groups under stress and under faults.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::local::{LocalRank, local_group_at};
use super::*;
use crate::attention::Shard;
use crate::device::Executor;
use crate::error::{ErrorKind, Result};
use crate::partial::epoch::Epoch;

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system allocator, and a counter that allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's own promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        // SAFETY: the caller's own promise.
        unsafe { System.dealloc(data, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Long enough that only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);
const PLAIN: RoundHeader = RoundHeader { fingerprint: 42, fault: 0 };

fn config(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, setup_timeout: step, ..CommConfig::default() }
}

/// A small generator: xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn word(rank: usize, round: u64, at: usize) -> u64 {
    ((rank as u64) << 48 ^ round << 16 ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap()))
}

/// One round in which every rank sends `bytes` that depend on rank and round, and checks all that it gets.
fn checked_round(rank: &LocalRank, round: u64, bytes: usize) -> Result<()> {
    let me = rank.shard().rank as usize;
    let world = rank.shard().world as usize;
    let mut fill = |slot: &mut [u8]| {
        assert_eq!((slot.len(), slot.as_ptr() as usize % 64), (bytes, 0));
        for (at, to) in slot.chunks_exact_mut(8).enumerate() {
            to.copy_from_slice(&word(me, round, at).to_ne_bytes());
        }
    };
    let mut read = 0;
    let mut take = |all: &dyn Round| {
        for peer in 0..world {
            assert_eq!(all.fault(peer), peer as u64 ^ round, "fault of rank {peer} in round {round}");
            for (at, value) in words(all.payload(peer)).enumerate() {
                assert_eq!(value, word(peer, round, at), "rank {me} reads rank {peer}, round {round}, word {at}");
            }
            read += 1;
        }
    };
    let header = RoundHeader { fingerprint: round, fault: me as u64 ^ round };
    rank.round(header, bytes, &mut fill, &mut take)?;
    assert_eq!(read, world);
    Ok(())
}

fn plain_round(rank: &LocalRank) -> Result<()> {
    rank.round(PLAIN, 64, &mut |_| (), &mut |_| ())
}

/// Runs `body` for every rank, each on a thread of its own, and gives the results in rank order.
fn on_threads<T: Send>(ranks: Vec<LocalRank>, body: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let handles: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| body(rank))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

fn stress(world: usize, rounds: u64, start: Epoch) {
    on_threads(local_group_at(world, &config(LONG), start).unwrap(), |rank| {
        // Sizes follow the round, delays the rank.
        let mut sizes = Random(0x1234_5678_9abc_def1);
        let mut delays = Random(rank.shard().rank as u64 + 77);
        for round in 0..rounds {
            let large = sizes.next().is_multiple_of(64);
            let bytes = sizes.next() as usize % if large { rank.capacity().min(1 << 18) + 1 } else { 4096 };
            match delays.next() % 200 {
                0 => std::thread::sleep(Duration::from_micros(delays.next() % 300)),
                1..20 => std::thread::yield_now(),
                _ => {}
            }
            checked_round(&rank, round, bytes).unwrap();
        }
        assert_eq!(rank.completed(), rounds);
        rank
    });
}

#[test]
fn every_rank_reads_every_payload_of_every_round() {
    for (world, rounds) in [(1, 500), (2, 4000), (3, 3000), (4, 3000), (5, 2000), (8, 1500), (16, 1000)] {
        stress(world, rounds, Epoch::START);
    }
}

#[test]
fn epochs_wrap() {
    for world in [2, 3] {
        stress(world, 400, Epoch::from_flag(u32::MAX - 200));
    }
}

#[test]
fn full_payloads_and_too_large_ones() {
    let ranks = local_group(2, &config(LONG)).unwrap();
    assert_eq!(ranks[0].capacity(), 1 << 20);
    let results = on_threads(ranks, |rank| {
        checked_round(&rank, 0, rank.capacity()).unwrap();
        checked_round(&rank, 1, 0).unwrap();
        (rank.round(PLAIN, rank.capacity() + 1, &mut |_| (), &mut |_| ()).unwrap_err(), rank)
    });
    for (error, _) in results {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    for (world, capacity) in [(32, 1 << 20), (64, 1 << 19), (1024, 1 << 15)] {
        assert_eq!(local_group(world, &config(LONG)).unwrap()[0].capacity(), capacity);
    }
    for world in [0, 1025, usize::MAX] {
        assert_eq!(local_group(world, &config(LONG)).err().unwrap().kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn an_allgather_gives_all_blobs_in_rank_order() {
    on_threads(local_group(5, &config(LONG)).unwrap(), |rank| {
        let me = rank.shard().rank as u8;
        for number in 0..200u8 {
            let blob = vec![me ^ number; usize::from(me)];
            let all = rank.allgather(&blob).unwrap();
            let wanted: Vec<Vec<u8>> = (0..5).map(|r| vec![r ^ number; usize::from(r)]).collect();
            assert_eq!(all, wanted);
            checked_round(&rank, number.into(), 256).unwrap();
        }
        rank
    });
}

#[test]
fn another_call_is_desync_on_every_rank_naming_the_odd_one() {
    for (world, odd) in [(2, 1), (3, 0), (4, 2), (8, 7)] {
        let results = on_threads(local_group(world, &config(LONG)).unwrap(), |rank| {
            let me = rank.shard().rank;
            for _ in 0..10 {
                plain_round(&rank).unwrap();
            }
            let header = RoundHeader { fingerprint: if me == odd { 1 } else { 2 }, fault: 0 };
            let mut taken = false;
            let error = rank.round(header, 64, &mut |_| (), &mut |_| taken = true).unwrap_err();
            let later = plain_round(&rank).unwrap_err();
            assert_eq!((taken, &later, rank.status().as_ref()), (false, &error, Some(&error)));
            assert_eq!(rank.allgather(&[]).unwrap_err(), error);
            (error, rank)
        });
        for (me, (error, _)) in results.iter().enumerate() {
            let wanted = if world == 2 { 1 - me as i32 } else { odd };
            assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(wanted)), "{error}");
        }
    }
}

#[test]
fn another_size_is_desync() {
    let results = on_threads(local_group(3, &config(LONG)).unwrap(), |rank| {
        let bytes = if rank.shard().rank == 1 { 128 } else { 64 };
        (rank.round(PLAIN, bytes, &mut |_| (), &mut |_| ()).unwrap_err(), rank)
    });
    for (error, _) in results {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(1)));
    }
}

#[test]
fn a_rank_that_never_comes_is_named_and_the_process_goes_on() {
    for setup in [false, true] {
        let start = Instant::now();
        let barrier = Barrier::new(4);
        let results = on_threads(local_group(4, &config(Duration::from_millis(400))).unwrap(), |rank| {
            barrier.wait();
            if rank.shard().rank == 2 {
                // Later than the deadline: it finds the error of the others.
                while rank.status().is_none() {
                    assert!(start.elapsed() < LONG);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            let error = match setup {
                true => rank.allgather(b"blob").unwrap_err(),
                false => plain_round(&rank).unwrap_err(),
            };
            let again = plain_round(&rank).unwrap_err();
            assert_eq!(again, error);
            (error, rank)
        });
        for (error, _) in &results {
            assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(2)), "{error}");
            assert!(error.message().contains(if setup { "setup_timeout_ns" } else { "step_timeout_ns" }), "{error}");
        }
        stress(4, 20, Epoch::START);
    }
}

#[test]
fn abort_ends_every_wait_and_names_who_aborted() {
    let mut ranks = local_group(4, &config(LONG)).unwrap();
    let aborter = ranks.remove(1);
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .map(|(i, rank)| {
                scope.spawn(move || {
                    let result = if i == 0 { rank.allgather(&[]).map(|_| ()) } else { plain_round(&rank) };
                    (result.unwrap_err(), plain_round(&rank).unwrap_err(), rank)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        aborter.abort();
        let results: Vec<_> = handles.into_iter().map(|handle| handle.join().unwrap()).collect();
        assert!(start.elapsed() < LONG / 4);
        results
    });
    for (error, later, _) in results {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Aborted, Some(1)));
        assert_eq!(later, error);
    }
    assert_eq!(plain_round(&aborter).unwrap_err().kind(), ErrorKind::Aborted);
}

#[test]
fn a_rank_that_leaves_is_lost_to_those_who_wait() {
    for setup in [false, true] {
        let results = on_threads(local_group(3, &config(LONG)).unwrap(), |rank| {
            for _ in 0..5 {
                plain_round(&rank).unwrap();
            }
            if rank.shard().rank == 0 {
                std::thread::sleep(Duration::from_millis(10));
                drop(rank);
                return None;
            }
            Some((if setup { rank.allgather(&[]).unwrap_err() } else { plain_round(&rank).unwrap_err() }, rank))
        });
        for (error, _) in results.into_iter().flatten() {
            assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(0)), "{error}");
        }
    }
}

#[test]
fn ranks_may_leave_one_after_the_other_in_peace() {
    for _ in 0..200 {
        on_threads(local_group(3, &config(LONG)).unwrap(), |rank| {
            for round in 0..3 {
                checked_round(&rank, round, 512).unwrap();
            }
        });
    }
}

#[test]
fn a_failing_rank_takes_its_peers_along() {
    let results = on_threads(local_group(3, &config(LONG)).unwrap(), |rank| {
        if rank.shard().rank == 1 {
            rank.fail(&crate::error::Error::new(ErrorKind::NoMemory, "nothing left"));
        }
        (plain_round(&rank).unwrap_err(), rank)
    });
    for (error, _) in results {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::NoMemory, Some(1)));
        assert!(error.message().contains("nothing left"));
    }
}

#[test]
fn a_panic_in_a_round_breaks_the_group_at_once() {
    for in_take in [false, true] {
        let results = on_threads(local_group(2, &config(LONG)).unwrap(), |rank| {
            if rank.shard().rank == 0 {
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    rank.round(PLAIN, 64, &mut |_| assert!(in_take, "fill"), &mut |_| panic!("take"))
                }));
                assert!(caught.is_err());
            } else if in_take {
                plain_round(&rank).unwrap();
            }
            (plain_round(&rank).unwrap_err(), rank)
        });
        for (error, _) in results {
            assert_eq!((error.kind(), error.rank()), (ErrorKind::Internal, Some(0)), "{error}");
        }
    }
}

#[test]
fn two_calls_at_once_on_a_rank_are_refused() {
    let ranks = local_group(2, &config(LONG)).unwrap();
    let inside = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let first = &ranks[0];
        let waiting =
            scope.spawn(move || first.round(PLAIN, 64, &mut |_| inside.store(true, Ordering::Release), &mut |_| ()));
        while !inside.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        assert_eq!(plain_round(&ranks[0]).unwrap_err().kind(), ErrorKind::Busy);
        plain_round(&ranks[1]).unwrap();
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn a_rank_that_left_has_no_calls() {
    let ranks = local_group(2, &config(LONG)).unwrap();
    ranks[0].leave();
    ranks[0].leave();
    assert_eq!(plain_round(&ranks[0]).unwrap_err().kind(), ErrorKind::ParentDestroyed);
    assert_eq!(ranks[0].status(), None);
    let error = plain_round(&ranks[1]).unwrap_err();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(0)));
}

#[test]
fn rounds_allocate_nothing() {
    on_threads(local_group(3, &config(LONG)).unwrap(), |rank| {
        checked_round(&rank, 0, 4096).unwrap();
        let before = ALLOCATIONS.get();
        for round in 1..1000 {
            checked_round(&rank, round, 4096).unwrap();
        }
        assert_eq!(ALLOCATIONS.get(), before);
        rank
    });
}

#[test]
fn a_thousand_groups_with_threads_leave_nothing_behind() {
    let (threads, maps) = (proc_count("task"), proc_lines("maps"));
    let mut after = (0, 0);
    for cycle in 0..1000 {
        let ranks = local_group(3, &config(LONG)).unwrap();
        let workers = crate::device::Workers::new(3, "test", cycle % 2 == 0).unwrap();
        workers.run(&|_| ()).unwrap();
        let queue = crate::device::Queue::new(4, "test").unwrap();
        queue.push(|| Ok(()), LONG).unwrap();
        if cycle % 50 == 0 {
            on_threads(ranks, |rank| checked_round(&rank, 0, 64).unwrap());
        }
        after = (proc_count("task"), proc_lines("maps"));
    }
    // Other tests run beside this one; a leak would show a thousandfold.
    assert!(after.0 < threads + 200, "threads {threads} before, {} after", after.0);
    assert!(after.1 < maps + 500, "mappings {maps} before, {} after", after.1);
}

fn proc_count(of: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{of}")).map_or(0, Iterator::count)
}

fn proc_lines(of: &str) -> usize {
    std::fs::read_to_string(format!("/proc/self/{of}")).map_or(0, |text| text.lines().count())
}

#[test]
fn random_faults_always_end_with_the_same_story() {
    let mut random = Random(2024);
    for case in 0..150 {
        let world = 2 + random.next() as usize % 5;
        let culprit = random.next() as usize % world;
        let at = random.next() % 30;
        let fault = random.next() % 4;
        let stop = AtomicBool::new(false);
        let barrier = Barrier::new(world);
        let results = on_threads(local_group(world, &config(LONG)).unwrap(), |rank| {
            let me = rank.shard().rank as usize;
            barrier.wait();
            for round in 0.. {
                assert!(!stop.load(Ordering::Relaxed) || round <= at + 1, "case {case} went past its fault");
                if me == culprit && round == at {
                    stop.store(true, Ordering::Relaxed);
                    match fault {
                        0 => rank.abort(),
                        1 => rank.fail(&crate::error::Error::new(ErrorKind::System, "told to")),
                        2 => drop(rank),
                        _ => {
                            let header = RoundHeader { fingerprint: !round, fault: 0 };
                            return rank.round(header, 64, &mut |_| (), &mut |_| ()).err();
                        }
                    }
                    return None;
                }
                if let Err(error) = checked_round(&rank, round, 64) {
                    return Some(error);
                }
            }
            None
        });
        let kind = [ErrorKind::Aborted, ErrorKind::System, ErrorKind::PeerLost, ErrorKind::Desync][fault as usize];
        for (rank, error) in results.into_iter().enumerate() {
            if rank != culprit {
                let error = error.unwrap();
                assert_eq!((error.kind(), error.rank()), (kind, Some(culprit as i32)), "case {case}: {error}");
            }
        }
    }
}

#[test]
fn a_group_describes_itself() {
    let ranks = local_group(3, &CommConfig::default()).unwrap();
    let text = ranks[1].describe();
    for part in [
        r#""kind":"local""#,
        r#""world":3,"rank":1"#,
        r#""capacity_bytes":1048576"#,
        r#"[{"peer":0,"kind":"shared_memory"},{"peer":2,"kind":"shared_memory"}]"#,
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(text.matches('{').count(), text.matches('}').count());
    assert_ne!(ranks[0].group_id(), local_group(1, &CommConfig::default()).unwrap()[0].group_id());
    assert_eq!(ranks[2].shard(), Shard { rank: 2, world: 3 });
}

/// Faults are armed for the process; a rank that no other test has keeps them here.
#[cfg(feature = "fault-injection")]
#[test]
fn injected_faults_end_the_round_on_every_rank() {
    const WORLD: usize = 20;
    for point in ["comm.publish", "comm.wait", "comm.take"] {
        for (action, kind) in [("panic", ErrorKind::Internal), ("fail", ErrorKind::NoMemory)] {
            crate::fault::arm(&format!("{point}#19={action}@3")).unwrap();
            let results = on_threads(local_group(WORLD, &config(LONG)).unwrap(), |rank| {
                let mut rounds = 0;
                let error = loop {
                    let call = std::panic::AssertUnwindSafe(|| checked_round(&rank, rounds, 64));
                    match std::panic::catch_unwind(call) {
                        Ok(Ok(())) => rounds += 1,
                        Ok(Err(error)) => break error,
                        Err(_) => break rank.status().unwrap(),
                    }
                };
                (rounds, error, rank)
            });
            for (rounds, error, rank) in results {
                // Where rank 19 had published, its peers may have completed the round.
                assert!(rounds == 3 || (rounds == 4 && point != "comm.publish"), "{point} {action}: {rounds} rounds");
                let status = rank.status().unwrap();
                assert_eq!((error.kind(), status.kind(), status.rank()), (kind, kind, Some(19)), "{point} {action}");
            }
        }
        crate::fault::arm(&format!("{point}#19=delay:30")).unwrap();
        let results = on_threads(local_group(WORLD, &config(LONG)).unwrap(), |rank| {
            (0..3).for_each(|round| checked_round(&rank, round, 64).unwrap());
            rank
        });
        assert_eq!(results.len(), WORLD);
    }
}
