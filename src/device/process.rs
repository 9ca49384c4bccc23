//! What belongs to one process. A forked child begins without it: it has not got the threads of its parent, one of which may
//! have held any lock when it was forked.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// How many forks lie between this process and the one that loaded the library.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// Runs in a forked child before anything else, and does only what a signal handler may do.
extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Has forks counted, from now on. Comes before any object is made.
pub(crate) fn count_forks() -> Result<()> {
    static COUNTED: AtomicBool = AtomicBool::new(cfg!(miri));
    if COUNTED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: the handler is a function of this library, which takes it back when it is unloaded; it changes one word.
    if unsafe { libc::pthread_atfork(None, None, Some(in_child)) } != 0 {
        COUNTED.store(false, Ordering::Relaxed);
        return Err(Error::new(ErrorKind::NoMemory, "fork: no memory for the handler in the child"));
    }
    Ok(())
}

/// How many forks lie between this process and the one that loaded the library.
pub(crate) fn forks() -> usize {
    FORKS.load(Ordering::Relaxed)
}

/// A value of this process, made when it is first asked for and never freed: calls may be under way when the process ends. A
/// child leaves that of its parent as it is.
pub(crate) struct PerProcess<T: 'static>(AtomicPtr<Made<T>>);

/// A value, and after how many forks it was made.
struct Made<T> {
    forks: usize,
    value: T,
}

impl<T: Default + Sync> PerProcess<T> {
    /// None yet.
    pub const fn new() -> PerProcess<T> {
        PerProcess(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// The value of this process.
    pub fn get(&self) -> &'static T {
        let known = self.0.load(Ordering::Acquire);
        // SAFETY: null, or made by `Box::into_raw` below, here or in a thread or a parent of this process; never freed.
        if let Some(made) = unsafe { known.as_ref() }.filter(|made| made.forks == forks()) {
            return &made.value;
        }
        let new = Box::into_raw(Box::new(Made { forks: forks(), value: T::default() }));
        let made = match self.0.compare_exchange(known, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => new,
            Err(first) => {
                // SAFETY: made above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
                first
            }
        };
        // SAFETY: what is stored is never freed; another thread of this process stored what was not stored here.
        &unsafe { &*made }.value
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    #[cfg(not(miri))]
    fn a_forked_child_begins_without_the_locks_of_its_parent() {
        static VALUES: PerProcess<Mutex<Vec<i32>>> = PerProcess::new();
        count_forks().unwrap();
        let mut values = VALUES.get().lock().unwrap();
        values.push(1);
        assert!(std::ptr::eq(VALUES.get(), VALUES.get()));
        // SAFETY: the child calls nothing but `get`, a lock that nobody else has and what ends it.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above; `alarm` ends a child that hangs.
            unsafe { libc::alarm(20) };
            let is_new = VALUES.get().try_lock().is_ok_and(|values| values.is_empty());
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!is_new)) };
        }
        let mut status = -1;
        // SAFETY: the call writes one int to a local.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(*values, [1]);
    }
}
