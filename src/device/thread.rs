//! Threads of the library: named, with all signals blocked, floating-point state at its default, joined.
//!
//! Calls of the CUDA driver and of NCCL may take for ever, and nothing ends them. Such a call runs in [`run_bounded`] on a
//! thread of its own, which its caller leaves behind when the time is up. A thread that was left behind is joined by a later
//! call of the library, once it has ended.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::float_state::FloatState;
use super::process::PerProcess;
use crate::error::{Error, ErrorKind, Result};

/// Starts a thread. `System` where the machine starts none.
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
    /// The end of the innermost [`Deadline`] of this thread.
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Bounds the calling thread's waits in [`run_bounded`], all together, while it lives. Bound to its thread.
pub(crate) struct Deadline {
    outer: Option<Instant>,
    this_thread: PhantomData<*mut ()>,
}

impl Deadline {
    /// Ends `timeout` from now, or when a deadline that is already set does.
    pub fn within(timeout: Duration) -> Deadline {
        let (outer, until) = (UNTIL.get(), Instant::now() + timeout);
        UNTIL.set(Some(outer.map_or(until, |outer| outer.min(until))));
        Deadline { outer, this_thread: PhantomData }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        UNTIL.set(self.outer);
    }
}

/// A value whose drop is bounded by a [`Deadline`] of its own, all its parts together.
pub(crate) struct Within<T> {
    value: ManuallyDrop<T>,
    timeout: Duration,
}

impl<T> Within<T> {
    /// `value`, whose drop may wait for `timeout`.
    pub fn new(value: T, timeout: Duration) -> Within<T> {
        Within { value: ManuallyDrop::new(value), timeout }
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
        let _deadline = Deadline::within(self.timeout);
        // SAFETY: `drop` runs once, and no method of `self` can be called after it.
        unsafe { ManuallyDrop::drop(&mut self.value) };
    }
}

/// Threads that their callers left behind.
static LEFT: PerProcess<Mutex<Vec<JoinHandle<()>>>> = PerProcess::new();

/// Runs `body`, which may hang, on a thread called `name`. Returns when it is done, after `timeout`, or at the [`Deadline`],
/// whichever is first. Where the system starts no thread, `body` does not run, and what it owns is leaked: dropping it could
/// hang here.
pub(crate) fn run_bounded(name: &str, timeout: Duration, body: impl FnOnce() + Send + 'static) {
    join_ended();
    let body = Arc::new(Mutex::new(Some(body)));
    let (theirs, (done, wait)) = (Arc::clone(&body), mpsc::channel());
    let started = spawn(name.to_string(), move || {
        let body = theirs.lock().take();
        body.into_iter().for_each(|body| body());
        // The caller may have stopped listening.
        let _ = done.send(());
    });
    let Ok(thread) = started else { return std::mem::forget(body) };
    let left = UNTIL.get().map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = left.map_or(timeout, |left| left.min(timeout));
    if wait.recv_timeout(timeout) == Err(mpsc::RecvTimeoutError::Timeout) {
        leave(thread);
    } else {
        // The body has ended; a panic in it ended that thread only.
        let _ = thread.join();
    }
}

/// Takes over a thread that its caller does not wait for.
pub(crate) fn leave(thread: JoinHandle<()>) {
    LEFT.get().lock().push(thread);
}

/// Joins the threads that were left behind and have ended since. Waits for none that runs.
pub(crate) fn join_ended() {
    let mut left = LEFT.get().lock();
    let (ended, running) = std::mem::take(&mut *left).into_iter().partition(JoinHandle::is_finished);
    *left = running;
    drop(left);
    let ended: Vec<JoinHandle<()>> = ended;
    for thread in ended {
        let _ = thread.join();
    }
}

/// Runs `body`; a panic in it is an `Internal` error.
pub(crate) fn catch<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    // What unwinds half-way is dropped; shared state is behind locks that outlive a panic.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = format!("a defect of the library was caught: {}", panic_message(&*payload));
        // Dropping what a panic carries may itself panic.
        std::mem::forget(payload);
        Err(Error::new(ErrorKind::Internal, text))
    })
}

/// The message of a caught panic.
pub(super) fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}

/// Blocks every signal on the calling thread while it lives: a thread starts with the mask of its maker.
struct SignalsBlocked {
    saved: libc::sigset_t,
}

impl SignalsBlocked {
    fn enter() -> SignalsBlocked {
        // SAFETY: sigset_t is plain data for which zero is a value; both calls write only the two local sets.
        unsafe {
            let (mut all, mut saved) = (std::mem::zeroed(), std::mem::zeroed());
            // Miri knows no signals.
            if !cfg!(miri) {
                libc::sigfillset(&mut all);
                libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut saved);
            }
            SignalsBlocked { saved }
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        if !cfg!(miri) {
            // SAFETY: `saved` is the set that `enter` read on this thread; the null pointer asks for no old set.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.saved, std::ptr::null_mut()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Waits until no thread of this name is left in the process.
    fn wait_for_the_end_of(name: &str) {
        let began = Instant::now();
        let is_left = || LEFT.get().lock().iter().any(|thread| thread.thread().name() == Some(name));
        while is_left() || names().iter().any(|found| found == name) {
            assert!(began.elapsed() < LONG, "{name} is still there");
            join_ended();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The names of this process's threads, as the kernel has them: at most 15 bytes.
    fn names() -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).map(trimmed).collect()
    }

    fn trimmed(text: String) -> String {
        text.trim().to_string()
    }

    #[test]
    fn a_deadline_is_for_all_together() {
        let short = Duration::from_millis(60);
        let began = Instant::now();
        let (hold, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        {
            let _outer = Deadline::within(short);
            let _inner = Deadline::within(LONG);
            for _ in 0..4 {
                let held = Arc::clone(&held);
                run_bounded("deadline-test", LONG, move || {
                    let _ = held.lock().recv();
                });
            }
            assert!(began.elapsed() >= short && began.elapsed() < LONG / 4, "{:?}", began.elapsed());
        }
        drop(hold);
        let (told, heard) = mpsc::channel();
        run_bounded("deadline-test", LONG, move || told.send(()).unwrap());
        assert_eq!(heard.try_recv(), Ok(()), "waited for");
        wait_for_the_end_of("deadline-test");
    }

    #[test]
    fn a_thread_that_was_left_behind_is_joined_later() {
        let ((hold, held), (start, started)) = (mpsc::channel::<()>(), mpsc::channel());
        run_bounded("left-behind", Duration::ZERO, move || {
            start.send(()).unwrap();
            let _ = held.recv();
        });
        started.recv_timeout(LONG).unwrap();
        let is_left = || LEFT.get().lock().iter().any(|thread| thread.thread().name() == Some("left-behind"));
        join_ended();
        assert!(is_left() && names().contains(&"left-behind".to_string()));
        drop(hold);
        wait_for_the_end_of("left-behind");
        assert!(!is_left());
    }
}
