//! The thread that ends callbacks by the library's own clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::device::{EventCount, WaitStrategy, spawn};
use crate::error::Result;

/// How often the watchdog looks at the clock.
const INTERVAL: Duration = Duration::from_millis(100);

/// Raises a word that callbacks look at when the one that runs is past its deadline. Its thread ends when it is dropped.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Not 0: callbacks give up.
    abort: AtomicI32,
    /// Whether `abort` was raised because the deadline had passed.
    late: AtomicBool,
    /// When the callback that runs must be done, in nanoseconds after `start`; 0: none runs.
    deadline: AtomicU64,
    start: Instant,
    stop: AtomicBool,
    events: EventCount,
}

impl Watchdog {
    /// Starts the thread. `System` where the machine gives none.
    pub fn start() -> Result<Watchdog> {
        let shared = Arc::new(Shared {
            abort: AtomicI32::new(0),
            late: AtomicBool::new(false),
            deadline: AtomicU64::new(0),
            start: Instant::now(),
            stop: AtomicBool::new(false),
            events: EventCount::default(),
        });
        let watching = Arc::clone(&shared);
        let thread = spawn("treeattn-watch".into(), move || watching.run())?;
        Ok(Watchdog { shared, thread: Some(thread) })
    }

    /// The word that callbacks look at; valid as long as `self`.
    pub fn abort_word(&self) -> *const i32 {
        self.shared.abort.as_ptr()
    }

    /// A callback begins, and must be done by `until`.
    pub fn arm(&self, until: Instant) {
        let at = until.saturating_duration_since(self.shared.start).as_nanos();
        self.shared.deadline.store(u64::try_from(at).unwrap_or(u64::MAX).max(1), Ordering::Release);
    }

    /// The callback is done.
    pub fn disarm(&self) {
        self.shared.deadline.store(0, Ordering::Release);
    }

    /// Ends the callback that runs, and all later ones.
    pub fn abort(&self) {
        self.shared.abort.store(1, Ordering::Release);
    }

    /// Whether a callback was past its deadline.
    pub fn was_late(&self) -> bool {
        self.shared.late.load(Ordering::Acquire)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.events.notify();
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended it already.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let seen = self.events.key();
            let deadline = self.deadline.load(Ordering::Acquire);
            if deadline != 0 && self.start.elapsed().as_nanos() > u128::from(deadline) {
                self.late.store(true, Ordering::Release);
                self.abort.store(1, Ordering::Release);
            }
            self.events.wait(seen, WaitStrategy::Park, Some(Instant::now() + INTERVAL));
        }
    }
}
