//! Interleavings of a few ranks running [`super::epoch`], by loom, up to a bound of preemptions.
//!
//! Payloads are loom cells, which panic on a read that races with a write or that no ordering makes visible. Run with
//! `RUSTFLAGS="--cfg loom --cfg unit_tests" cargo test --release --lib epoch_model`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::thread;

use super::epoch::{Arrivals, Cursor, Epoch, HEADER_WORDS, Header, SLOTS, Slot, Word32, Word64};

impl Word32 for AtomicU32 {
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }
    fn store(&self, value: u32, order: Ordering) {
        self.store(value, order);
    }
    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_add(value, order)
    }
}

impl Word64 for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

/// Two ranks are checked to the end; of three, whose waits interleave without end, what this time allows.
const LONGEST: Duration = Duration::from_secs(10);

/// What checks interleavings with up to so many preemptions.
pub(super) fn bounded(preemptions: usize) -> Builder {
    let mut model = Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 100_000;
    model.max_duration = Some(LONGEST);
    // How many runs go by between two looks at the clock.
    model.checkpoint_interval = 1000;
    model
}

/// How a rank learns that its peers have published.
#[derive(Clone, Copy, PartialEq)]
enum Wait {
    /// By the arrival counter, as ranks of one process do.
    Arrivals,
    /// By the header of every peer, as ranks without common memory do.
    Headers,
}

struct Window {
    slots: [Slot<AtomicU64>; SLOTS],
    payloads: [UnsafeCell<u64>; SLOTS],
}

struct World {
    windows: Vec<Window>,
    arrivals: Arrivals<AtomicU32>,
}

fn payload(rank: usize, epoch: Epoch) -> u64 {
    u64::from(epoch.flag()) << 8 | rank as u64
}

impl World {
    fn new(ranks: usize, start: Epoch) -> World {
        let slot = || Slot::of(std::array::from_fn::<_, HEADER_WORDS, _>(|_| AtomicU64::new(0)));
        let window =
            || Window { slots: std::array::from_fn(|_| slot()), payloads: std::array::from_fn(|_| UnsafeCell::new(0)) };
        World {
            windows: (0..ranks).map(|_| window()).collect(),
            arrivals: Arrivals::starting_at(std::array::from_fn(|_| AtomicU32::new(0)), AtomicU32::new(0), start),
        }
    }

    fn publish(&self, rank: usize, epoch: Epoch, wait: Wait) {
        let window = &self.windows[rank];
        // SAFETY: loom reports whoever reads at the same time.
        window.payloads[epoch.slot()].with_mut(|to| unsafe { *to = payload(rank, epoch) });
        match wait {
            Wait::Arrivals => {
                self.arrivals.arrive(epoch, self.windows.len());
            }
            Wait::Headers => {
                let header = Header { fingerprint: payload(rank, epoch), fault: 0 };
                window.slots[epoch.slot()].publish(epoch, header);
            }
        }
    }

    fn await_peers(&self, epoch: Epoch, wait: Wait) {
        match wait {
            Wait::Arrivals => {
                while !self.arrivals.is_complete(epoch) {
                    thread::yield_now();
                }
            }
            Wait::Headers => {
                for (rank, window) in self.windows.iter().enumerate() {
                    let header = loop {
                        match window.slots[epoch.slot()].read(epoch) {
                            Some(header) => break header,
                            None => thread::yield_now(),
                        }
                    };
                    assert_eq!(header.fingerprint, payload(rank, epoch));
                }
            }
        }
    }

    fn read(&self, epoch: Epoch) {
        for (rank, window) in self.windows.iter().enumerate() {
            // SAFETY: as in `publish`.
            window.payloads[epoch.slot()].with(|from| assert_eq!(unsafe { *from }, payload(rank, epoch)));
        }
    }
}

/// `epochs` rounds of `ranks` ranks. Without `guard` a rank begins an epoch before it has read the one before.
fn check(ranks: usize, epochs: usize, preemptions: usize, wait: Wait, guard: bool) {
    bounded(preemptions).check(move || {
        // The wrap lies between the first and the second epoch.
        let start = Epoch::from_flag(u32::MAX - 1);
        let world = Arc::new(World::new(ranks, start));
        let run = move |world: &World, rank: usize| {
            let cursor = Cursor::starting_at(AtomicU32::new(0), AtomicU32::new(0), start);
            let mut unread: Option<Epoch> = None;
            for _ in 0..epochs {
                let epoch = cursor.begin().expect("the last epoch is consumed");
                world.publish(rank, epoch, wait);
                world.await_peers(epoch, wait);
                if guard {
                    world.read(epoch);
                } else if let Some(late) = unread.replace(epoch) {
                    world.read(late);
                }
                cursor.consume(epoch);
            }
        };
        let threads: Vec<_> = (1..ranks)
            .map(|rank| {
                let world = Arc::clone(&world);
                thread::spawn(move || run(&world, rank))
            })
            .collect();
        run(&world, 0);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn two_ranks_never_meet_in_a_slot() {
    check(2, 4, 3, Wait::Arrivals, true);
    check(2, 3, 2, Wait::Headers, true);
}

#[test]
fn three_ranks_never_meet_in_a_slot() {
    check(3, 3, 1, Wait::Arrivals, true);
    check(3, 3, 1, Wait::Headers, true);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn reading_after_the_next_publication_is_caught() {
    check(2, 4, 3, Wait::Arrivals, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn reading_after_the_next_header_is_caught() {
    check(2, 4, 3, Wait::Headers, false);
}
