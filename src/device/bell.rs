//! How a thread of this library waits for another: it spins or yields for a short time, then parks on a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest time before a wait parks.
const LINGER: Duration = Duration::from_micros(20);
/// Spin hints between two looks.
const PAUSES: u32 = 16;

/// What a wait does before it parks, for at most [`LINGER`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linger {
    /// Looks again and again. For a thread that has a core of its own.
    Spin,
    /// Gives its core to others and looks when it gets it back. For a thread that may need this core: where the ring is near,
    /// this saves two context switches.
    Yield,
    /// Nothing. For a ring that is not near.
    Park,
}

/// A word that changes with every ring, and the number of threads parked on it.
///
/// To wait for a condition: read [`Bell::now`], test the condition, [`Bell::wait`] for a ring after that reading, and repeat.
/// Whoever makes the condition true rings afterwards. No ring is lost, since the futex compares the word.
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
        // Sequentially consistent, as the count of sleepers: either this thread sees the sleeper's count, or the sleeper's
        // futex sees the new word.
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
