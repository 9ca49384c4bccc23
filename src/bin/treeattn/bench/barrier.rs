//! A barrier that releases every rank at the same moment, without going to sleep.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Turns before a waiting rank offers its core to others.
const SPINS: usize = 2_000;

/// Where ranks wait for each other between two measurements.
pub struct Barrier {
    ranks: usize,
    /// Ranks that share cores give them up at once.
    spins: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl Barrier {
    pub fn new(ranks: usize, cores: usize) -> Barrier {
        let spins = if ranks <= cores { SPINS } else { 0 };
        Barrier { ranks, spins, arrived: AtomicUsize::new(0), round: AtomicUsize::new(0) }
    }

    /// Waits until all ranks have come.
    pub fn wait(&self) {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round + 1, Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            if spins < self.spins {
                spins += 1;
                spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}
