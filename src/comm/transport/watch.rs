//! The thread that ends callbacks by the library's own clock.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::device::{Bell, Linger};

/// How often the watch looks at the clock.
const WATCH: Duration = Duration::from_millis(100);

/// What the watching thread and the callbacks share.
pub(super) struct Watch {
    /// Not 0: callbacks give up.
    pub(super) abort: AtomicI32,
    /// Whether `abort` was raised because the deadline had passed.
    pub(super) late: AtomicBool,
    /// When the callback that runs must be done, in nanoseconds after `start`; 0: none runs.
    pub(super) deadline: AtomicU64,
    pub(super) start: Instant,
    pub(super) stop: AtomicBool,
    pub(super) bell: Bell,
}

impl Watch {
    pub(super) fn arm(&self, until: Instant) {
        let at = until.saturating_duration_since(self.start).as_nanos();
        self.deadline.store(u64::try_from(at).unwrap_or(u64::MAX).max(1), Ordering::Release);
    }

    pub(super) fn disarm(&self) {
        self.deadline.store(0, Ordering::Release);
    }

    /// Raises the abort word when the callback that runs is past its deadline.
    pub(super) fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let seen = self.bell.now();
            let deadline = self.deadline.load(Ordering::Acquire);
            if deadline != 0 && self.start.elapsed().as_nanos() > u128::from(deadline) {
                self.late.store(true, Ordering::Release);
                self.abort.store(1, Ordering::Release);
            }
            self.bell.wait(seen, Linger::Park, Some(Instant::now() + WATCH));
        }
    }
}
