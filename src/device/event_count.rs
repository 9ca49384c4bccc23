//! How a thread of this library waits for another: it spins or yields for a short time, then parks on a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest that a wait keeps its core, or asks for it again, before it parks.
const BUSY_WAIT: Duration = Duration::from_micros(20);
/// Spin hints between two looks.
const PAUSES: u32 = 16;

/// What a wait does before it parks, for at most [`BUSY_WAIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitStrategy {
    /// Looks again and again. For a thread that has a core of its own.
    Spin,
    /// Gives its core to others and looks when it gets it back. For a thread that shares its core with the one it waits for:
    /// where that one is nearly done, this saves two context switches.
    Yield,
    /// Nothing. For a condition that takes long to become true.
    Park,
}

/// An event count: a word that every notification changes, and the number of threads parked on it.
///
/// To wait for a condition: take [`EventCount::key`], test the condition, [`EventCount::wait`] with that key, and repeat.
/// Whoever makes the condition true notifies afterwards. No notification is lost, since the futex compares the word.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct EventCount {
    word: AtomicU32,
    sleepers: AtomicU32,
}

impl EventCount {
    /// What [`EventCount::wait`] waits to see changed.
    pub(crate) fn key(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Ends every wait that began before. No system call where nobody sleeps.
    pub(crate) fn notify(&self) {
        // Sequentially consistent, as the count of sleepers: either this thread sees the sleeper's count, or the sleeper's
        // futex sees the new word.
        self.word.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex(&self.word, libc::FUTEX_WAKE, i32::MAX as u32, None);
        }
    }

    /// Waits until a notification has come since `key` was taken, or `deadline` has passed; may also return early.
    pub(crate) fn wait(&self, key: u32, strategy: WaitStrategy, deadline: Option<Instant>) {
        let notified = match strategy {
            WaitStrategy::Spin => self.notified_soon(key, || (0..PAUSES).for_each(|_| std::hint::spin_loop())),
            WaitStrategy::Yield => self.notified_soon(key, std::thread::yield_now),
            WaitStrategy::Park => false,
        };
        if notified {
            return;
        }
        let left = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
            Some(left) if left.is_zero() => return,
            left => left,
        };
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        futex(&self.word, libc::FUTEX_WAIT, key, left);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether a notification comes within [`BUSY_WAIT`].
    fn notified_soon(&self, key: u32, pause: impl Fn()) -> bool {
        let start = Instant::now();
        while start.elapsed() <= BUSY_WAIT {
            if self.key() != key {
                return true;
            }
            pause();
        }
        false
    }
}

/// One private futex call. Its result is not used: every caller tests its condition again.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32, timeout: Option<Duration>) {
    let time = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos() as libc::c_long,
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word is borrowed, an aligned u32; the time is null or a local timespec; the kernel reads both and writes
    // neither. FUTEX_WAIT and FUTEX_WAKE use no further argument.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG, value, time) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_notification_or_deadline() {
        let events = EventCount::default();
        let key = events.key();
        events.wait(key, WaitStrategy::Spin, Some(Instant::now() + Duration::from_millis(5)));
        assert_eq!(events.key(), key);
        for strategy in [WaitStrategy::Spin, WaitStrategy::Yield, WaitStrategy::Park] {
            let key = events.key();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(5));
                    events.notify();
                });
                while events.key() == key {
                    events.wait(key, strategy, None);
                }
            });
        }
    }
}
