//! Threads of the library: named, with all signals blocked, floating-point state at its default.

use std::thread::{Builder, JoinHandle};

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
