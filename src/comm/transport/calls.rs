//! Calls of the engine's callbacks, each within its deadline, and the first error of this end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::callbacks::Transport;
use super::watchdog::Watchdog;
use crate::attention::Shard;
use crate::comm::errors;
use crate::error::{Error, ErrorKind, Result};

/// The callbacks of one rank.
pub(super) struct Calls {
    pub transport: Transport,
    pub shard: Shard,
    error: Mutex<Option<Error>>,
    watchdog: Watchdog,
}

/// How long a callback may take, and for whom.
pub(super) struct CallDeadline<'a> {
    /// What it is part of, for messages.
    pub what: &'a dyn Fn() -> String,
    /// The rank that it waits for, where it is one.
    pub peer: &'a [usize],
    pub until: Instant,
    /// The deadline's name and length, for messages.
    pub field: &'static str,
    pub timeout: Duration,
}

impl Calls {
    /// The callbacks of rank `shard`, and the thread that ends them.
    pub fn new(transport: Transport, shard: Shard) -> Result<Calls> {
        Ok(Calls { transport, shard, error: Mutex::new(None), watchdog: Watchdog::start()? })
    }

    /// One call of the engine's allgather: the bytes of `send` from every rank into `recv`.
    pub fn gather(&self, send: &[u8], recv: &mut [u8], deadline: &CallDeadline<'_>) -> Result<()> {
        assert!(recv.len() >= send.len() * self.shard.world as usize);
        self.call("allgather", deadline, |left, abort| {
            let (ctx, send, recv, bytes) = (self.transport.ctx, send.as_ptr(), recv.as_mut_ptr(), send.len());
            // SAFETY: `send` has `bytes` bytes and `recv` room for those of all ranks, by the assertion; both and the
            // word behind `abort` outlive the call. That the function keeps to these, and takes `ctx`, its maker
            // promised.
            unsafe { (self.transport.allgather)(ctx, send.cast(), recv.cast(), bytes, left, abort) }
        })
    }

    /// One call of the engine's sendrecv: `send` to rank `to` while `recv` comes from rank `from`.
    pub fn swap(
        &self,
        (to, from): (usize, usize),
        send: &[u8],
        recv: &mut [u8],
        deadline: &CallDeadline<'_>,
    ) -> Result<()> {
        let Some(sendrecv) = self.transport.sendrecv else {
            return Err(Error::unsupported("transport.sendrecv", "none", "a function"));
        };
        self.call("sendrecv", deadline, |left, abort| {
            let (ctx, to, from) = (self.transport.ctx, to as i32, from as i32);
            let (data, bytes) = (send.as_ptr().cast(), send.len());
            // SAFETY: the function is told the sizes of both slices, which outlive the call, as does the word behind
            // `abort`; the rest its maker promised.
            unsafe { sendrecv(ctx, data, bytes, to, recv.as_mut_ptr().cast(), recv.len(), from, left, abort) }
        })
    }

    /// Runs a callback, told what time is left, with the watchdog armed.
    fn call(
        &self,
        name: &str,
        deadline: &CallDeadline<'_>,
        callback: impl FnOnce(i64, *const i32) -> i32,
    ) -> Result<()> {
        let left = deadline.until.saturating_duration_since(Instant::now());
        if let Some(error) = self.status() {
            return Err(error);
        }
        self.watchdog.arm(deadline.until);
        let code = callback(i64::try_from(left.as_nanos()).unwrap_or(i64::MAX), self.watchdog.abort_word());
        self.watchdog.disarm();
        if code == 0 {
            return Ok(());
        }
        if let Some(error) = self.status() {
            return Err(error);
        }
        let what = (deadline.what)();
        if Instant::now() >= deadline.until || self.watchdog.was_late() {
            return Err(errors::timeout(&what, deadline.peer, deadline.field, deadline.timeout));
        }
        let message = format!("{what}: the transport's {name} returned {code}, wanted 0");
        let error = Error::new(ErrorKind::Transport, message);
        Err(match deadline.peer {
            [peer] => error.with_rank(*peer as i32),
            _ => error,
        })
    }

    /// The error that broke this end.
    pub fn status(&self) -> Option<Error> {
        self.lock().clone()
    }

    /// Breaks this end, unless it is broken, and ends the callback that runs.
    pub fn latch(&self, error: &Error) {
        let mut latched = self.lock();
        if latched.is_none() {
            // No other rank sees this error, so it need not say which rank failed.
            *latched = Some(error.clone());
        }
        drop(latched);
        self.watchdog.abort();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Error>> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
