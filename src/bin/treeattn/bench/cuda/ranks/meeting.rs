//! Where the threads of the ranks meet between measurements.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::outcome::Outcome;

/// Looks before a waiting thread offers its core to others.
const SPINS: usize = 20_000;

/// A barrier that one thread's failure ends for all.
pub struct Meeting {
    arrived: AtomicUsize,
    round: AtomicUsize,
    failed: AtomicBool,
    /// What each thread said last, as bits.
    said: Vec<AtomicU64>,
}

impl Meeting {
    pub fn new(ranks: usize) -> Meeting {
        Meeting {
            arrived: AtomicUsize::new(0),
            round: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            said: (0..ranks).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Waits until all threads have come; an error once one has failed.
    pub fn wait(&self) -> Outcome<()> {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.said.len() {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round + 1, Ordering::Release);
            return Ok(());
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            if self.failed.load(Ordering::Acquire) {
                return Err("another rank failed".into());
            }
            spins += 1;
            if spins < SPINS { spin_loop() } else { std::thread::yield_now() }
        }
        Ok(())
    }

    /// The largest of what the threads say.
    pub fn largest(&self, rank: usize, value: f64) -> Outcome<f64> {
        self.said[rank].store(value.to_bits(), Ordering::Release);
        self.wait()?;
        let largest = self.said.iter().map(|said| f64::from_bits(said.load(Ordering::Acquire))).fold(0.0, f64::max);
        // Nobody says something else before all have read.
        self.wait()?;
        Ok(largest)
    }

    /// Ends every wait.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_hear_the_largest_and_a_failure_ends_all() {
        let meeting = Meeting::new(3);
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let meeting = &meeting;
                scope.spawn(move || {
                    for turn in 0..50 {
                        let value = f64::from((rank + turn) % 3) + f64::from(turn);
                        assert_eq!(meeting.largest(rank as usize, value).unwrap(), f64::from(turn + 2));
                    }
                    match rank {
                        2 => meeting.fail(),
                        _ => assert!(meeting.wait().is_err()),
                    }
                });
            }
        });
    }
}
