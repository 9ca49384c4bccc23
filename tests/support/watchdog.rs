//! Ends a program that hangs.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// While it lives, a time limit. Past it the whole program ends, since nobody can end a rank that waits for ever.
pub struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    pub fn new(what: &str, limit: Duration) -> Watchdog {
        let (done, alive) = channel::<()>();
        let what = what.to_owned();
        let thread = thread::spawn(move || {
            if alive.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{what}: not done within {limit:?}");
                std::process::abort();
            }
        });
        Watchdog { done: Some(done), thread: Some(thread) }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // Its end of the channel goes, which is all that the thread waits for.
        self.done = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
