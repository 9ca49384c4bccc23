//! Threads of the library: named, with all signals blocked, floating-point state at its default.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::FloatState;
use crate::error::{Error, ErrorKind, Result};

/// Starts a thread. `System` where the machine gives none.
pub(crate) fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let blocked = SignalsBlocked::enter();
    let thread = Builder::new().name(name.clone()).spawn(move || {
        // A new thread inherits its maker's control register.
        let _default = FloatState::enter();
        body();
    });
    drop(blocked);
    thread.map_err(|e| Error::new(ErrorKind::System, format!("thread {name}: the system started none: {e}")))
}

/// As [`spawn`], for a thread that ends before `scope` does and may borrow what outlives it.
pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let blocked = SignalsBlocked::enter();
    let thread = Builder::new().name(name.into()).spawn_scoped(scope, move || {
        let _default = FloatState::enter();
        body()
    });
    drop(blocked);
    thread.map_err(|e| Error::new(ErrorKind::System, format!("thread {name}: the system started none: {e}")))
}

thread_local! {
    /// What [`Deadline`] says.
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// While it lives, all that this thread leaves to [`behind`] keeps it no longer than that together.
pub(crate) struct Deadline {
    outer: Option<Instant>,
    this_thread: PhantomData<*mut ()>,
}

impl Deadline {
    /// From now on; one that is set already counts if it is sooner.
    pub fn within(patience: Duration) -> Deadline {
        let (outer, until) = (UNTIL.get(), Instant::now() + patience);
        UNTIL.set(Some(outer.map_or(until, |outer| outer.min(until))));
        Deadline { outer, this_thread: PhantomData }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        UNTIL.set(self.outer);
    }
}

/// What is dropped within a [`Deadline`] of its own, all its parts together.
pub(crate) struct Within<T> {
    value: ManuallyDrop<T>,
    patience: Duration,
}

impl<T> Within<T> {
    pub fn new(value: T, patience: Duration) -> Within<T> {
        Within { value: ManuallyDrop::new(value), patience }
    }
}

impl<T> Deref for Within<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Within<T> {
    fn drop(&mut self) {
        let _deadline = Deadline::within(self.patience);
        // SAFETY: once, and nothing uses it after.
        unsafe { ManuallyDrop::drop(&mut self.value) };
    }
}

/// Runs `body`, which may wait for a device, on a thread of its own. Keeps the caller until its end, at most `patience` and
/// until the [`Deadline`]; then it goes on behind. Where no thread is to be had, it is left undone, and what it would have
/// given back is never freed.
pub(crate) fn behind(patience: Duration, body: impl FnOnce() + Send + 'static) {
    let body = Arc::new(Mutex::new(Some(body)));
    let (theirs, (done, wait)) = (Arc::clone(&body), mpsc::channel());
    let started = spawn("treeattn-free".into(), move || {
        let body = theirs.lock().take();
        body.into_iter().for_each(|body| body());
        // Nobody listens any more once the patience is over.
        let _ = done.send(());
    });
    let Ok(thread) = started else { return std::mem::forget(body) };
    let left = UNTIL.get().map(|until| until.saturating_duration_since(Instant::now()));
    let patience = left.map_or(patience, |left| left.min(patience));
    if wait.recv_timeout(patience) != Err(mpsc::RecvTimeoutError::Timeout) {
        // It has nothing left to do; a panic in it was its own end.
        let _ = thread.join();
    }
}

/// What a caught panic said.
pub(super) fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}

/// While alive, the calling thread blocks every signal, so that a thread it starts is born with all blocked.
struct SignalsBlocked {
    saved: libc::sigset_t,
}

impl SignalsBlocked {
    fn enter() -> SignalsBlocked {
        // SAFETY: sigset_t is plain data for which zero is a value; the calls write the two sets given.
        unsafe {
            let (mut all, mut saved) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut saved);
            SignalsBlocked { saved }
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: restores the set that `enter` saved on this thread.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.saved, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_for_all_together() {
        let (long, short) = (Duration::from_secs(20), Duration::from_millis(60));
        let began = Instant::now();
        let (hold, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        {
            let _outer = Deadline::within(short);
            let _inner = Deadline::within(long);
            for _ in 0..4 {
                let held = Arc::clone(&held);
                behind(long, move || {
                    let _ = held.lock().recv();
                });
            }
            assert!(began.elapsed() >= short && began.elapsed() < long / 4, "{:?}", began.elapsed());
        }
        drop(hold);
        let (told, heard) = mpsc::channel();
        behind(long, move || told.send(()).unwrap());
        assert_eq!(heard.try_recv(), Ok(()), "waited for");
    }
}
