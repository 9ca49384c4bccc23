//! The one way in which a thread of this library waits for another: linger briefly, then park on a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest that a wait lingers before it parks.
const LINGER: Duration = Duration::from_micros(20);
/// Pauses between two looks while spinning.
const PAUSES: u32 = 16;

/// What a wait does before it parks, for at most 20 us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linger {
    /// Looks again and again, where the one that is waited for has a core of its own.
    Spin,
    /// Gives its core to others and looks when it gets it back, where the one that is waited for may need this core. Where
    /// nobody does, or what is waited for is near, this saves two trips through the scheduler.
    Yield,
    /// Nothing: what is waited for is far.
    Park,
}

/// A word that changes with every ring, and the count of threads asleep on it.
///
/// To wait for a condition: read [`Bell::now`], test the condition, then [`Bell::wait`] for a ring after that reading,
/// and again. Whoever makes the condition true rings afterwards. No ring is lost: the futex compares the word.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Bell {
    word: AtomicU32,
    sleepers: AtomicU32,
}

impl Bell {
    /// The state to wait from.
    pub(crate) fn now(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// Ends every wait that began before. No system call where nobody sleeps.
    pub(crate) fn ring(&self) {
        // Sequentially consistent, as the sleeper's count: either it is seen here, or the futex sees the new word.
        self.word.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex(&self.word, libc::FUTEX_WAKE, i32::MAX as u32, None);
        }
    }

    /// Waits until the bell has rung since `seen`, or `deadline` has passed; may also return early.
    pub(crate) fn wait(&self, seen: u32, linger: Linger, deadline: Option<Instant>) {
        let rung = match linger {
            Linger::Spin => self.linger(seen, || (0..PAUSES).for_each(|_| std::hint::spin_loop())),
            Linger::Yield => self.linger(seen, std::thread::yield_now),
            Linger::Park => false,
        };
        if rung {
            return;
        }
        let left = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
            Some(left) if left.is_zero() => return,
            left => left,
        };
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        futex(&self.word, libc::FUTEX_WAIT, seen, left);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether the bell rings within [`LINGER`].
    fn linger(&self, seen: u32, pause: impl Fn()) -> bool {
        let start = Instant::now();
        while start.elapsed() <= LINGER {
            if self.now() != seen {
                return true;
            }
            pause();
        }
        false
    }
}

/// One private futex call. Its result is not needed: every caller tests its condition again.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32, timeout: Option<Duration>) {
    let time = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos() as libc::c_long,
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word is a live aligned u32 and the time, where given, a live timespec; FUTEX_WAIT and FUTEX_WAKE use
    // no further argument.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG, value, time) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_ring_or_deadline() {
        let bell = Bell::default();
        let seen = bell.now();
        bell.wait(seen, Linger::Spin, Some(Instant::now() + Duration::from_millis(5)));
        assert_eq!(bell.now(), seen);
        for linger in [Linger::Spin, Linger::Yield, Linger::Park] {
            let seen = bell.now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(5));
                    bell.ring();
                });
                while bell.now() == seen {
                    bell.wait(seen, linger, None);
                }
            });
        }
    }
}
