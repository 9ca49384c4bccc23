//! The one way in which a thread of this library waits for another: spin briefly, then park on a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest that a wait spins before it parks.
const SPIN: Duration = Duration::from_micros(20);
/// Pauses between two looks at the clock while spinning.
const PAUSES: u32 = 16;

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

    /// Waits until the bell has rung since `seen`, or `deadline` has passed; may also return early. `spin`: try
    /// for [`SPIN`] before parking.
    pub(crate) fn wait(&self, seen: u32, spin: bool, deadline: Option<Instant>) {
        if spin && self.spin(seen) {
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

    fn spin(&self, seen: u32) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..PAUSES {
                if self.now() != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                return false;
            }
        }
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
        bell.wait(seen, true, Some(Instant::now() + Duration::from_millis(5)));
        assert_eq!(bell.now(), seen);
        for spin in [false, true] {
            let seen = bell.now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(5));
                    bell.ring();
                });
                while bell.now() == seen {
                    bell.wait(seen, spin, None);
                }
            });
        }
    }
}
