//! One rank's end of an NCCL communicator of our own, in which no call blocks beyond a deadline.
//!
//! Calls are non-blocking: they return at once, and [`NcclRank::settle`] asks how they end. What NCCL offers no way out of
//! (a split of a blocking communicator, the end of a communicator, an abort, which have all been seen to hang) runs on a
//! thread of its own that stays behind when its time is up.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::library::{Config, FLOAT32, IN_PROGRESS, Library, RawComm, SUCCESS, Status, UINT8, UniqueId};
use crate::attention::Shard;
use crate::comm::errors;
use crate::device::cuda::{CudaDevice, CudaStream, Entered};
use crate::device::spawn;
use crate::error::{Error, ErrorKind, Result};

/// How long the end of a communicator keeps its caller; it may go on behind it.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// The first and the longest pause between two looks at a call that goes on.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));

/// When to give up, and what to say then.
#[derive(Clone, Copy)]
pub(crate) struct Limit {
    pub until: Instant,
    /// The deadline's name and length, for messages.
    pub field: &'static str,
    pub timeout: Duration,
}

impl Limit {
    /// `timeout` from now on, called `field`.
    pub fn new(field: &'static str, timeout: Duration) -> Limit {
        Limit { until: Instant::now() + timeout, field, timeout }
    }

    /// The error of a wait for `what` that took too long. NCCL does not say for whom.
    pub fn expired(&self, what: &str) -> Error {
        errors::timeout(what, &[], self.field, self.timeout)
    }
}

/// How an allreduce reduces.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reduction {
    Sum = 0,
    Maximum = 2,
}

/// One rank of an NCCL communicator that the library made. Calls are serialised here.
pub(crate) struct NcclRank {
    shard: Shard,
    link: Arc<Link>,
    /// How long the others may take to end the communicator.
    patience: Duration,
}

/// The communicator as NCCL knows it.
struct Link {
    library: &'static Library,
    device: Arc<CudaDevice>,
    /// Null once it has been given up.
    raw: AtomicPtr<c_void>,
    /// Held during calls: a communicator is not thread-safe.
    calls: Mutex<()>,
    /// Whether it failed, so that it can only be aborted.
    is_broken: AtomicBool,
}

impl NcclRank {
    /// Begins rank `shard` of the communicator called `id`, which is there once [`NcclRank::settle`] says so.
    pub fn begin(
        library: &'static Library,
        device: &Arc<CudaDevice>,
        id: &[u8; super::UNIQUE_ID_BYTES],
        shard: Shard,
        patience: Duration,
    ) -> Result<NcclRank> {
        let link = Link::new(library, device);
        let mut raw = std::ptr::null_mut();
        let entered = device.enter_to_change()?;
        let mut config = Config::non_blocking();
        // SAFETY: writes one handle, reads the config; the context is current.
        let status = unsafe {
            (library.calls.comm_init_rank_config)(&mut raw, shard.world, UniqueId(*id), shard.rank, &mut config)
        };
        drop(entered);
        link.begun(raw, status, "ncclCommInitRankConfig")?;
        Ok(NcclRank { shard, link: Arc::new(link), patience })
    }

    /// Splits a communicator of all ranks of `borrowed` off it. Collective over these, and blocks, until `limit`. The
    /// borrowed one is left alone from then on.
    ///
    /// # Safety
    /// `borrowed` is a live communicator of `library`, which nobody else uses during the call.
    pub unsafe fn split(
        library: &'static Library,
        device: &Arc<CudaDevice>,
        borrowed: RawComm,
        limit: Limit,
        patience: Duration,
    ) -> Result<NcclRank> {
        let shard = {
            let _entered = device.enter_to_change()?;
            let ask = |call: unsafe extern "C" fn(RawComm, *mut c_int) -> Status, name: &str| {
                let mut value = 0;
                // SAFETY: the communicator is live, as the caller vouches; writes one int.
                library.check(unsafe { call(borrowed, &mut value) }, name).map(|()| value)
            };
            let ordinal = ask(library.calls.comm_cu_device, "ncclCommCuDevice")?;
            if ordinal != device.device().ordinal {
                let wanted = format!("cuda:{ordinal}, the device of nccl_comm");
                return Err(Error::invalid("device", device.device(), wanted));
            }
            Shard {
                rank: ask(library.calls.comm_user_rank, "ncclCommUserRank")?,
                world: ask(library.calls.comm_count, "ncclCommCount")?,
            }
        };
        // Where the borrowed one blocks, so does its split, whatever the config of the new one says.
        let (borrowed, helper_device) = (borrowed as usize, Arc::clone(device));
        let (done, result) = mpsc::channel();
        spawn("treeattn-nccl".into(), move || {
            let link = Link::new(library, &helper_device);
            let split = link.split(borrowed as RawComm, shard.rank);
            // Nobody listens once the time is up: what came of it is then given up here.
            if let Err(mpsc::SendError((link, _))) = done.send((link, split)) {
                link.abort();
            }
        })?;
        let what = "splitting nccl_comm";
        let left = limit.until.saturating_duration_since(Instant::now());
        let (link, split) = result.recv_timeout(left).map_err(|_| limit.expired(what))?;
        split?;
        let rank = NcclRank { shard, link: Arc::new(link), patience };
        rank.settle(what, limit)?;
        Ok(rank)
    }

    /// Which rank of how many.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// The NCCL in use.
    pub fn library(&self) -> &'static Library {
        self.link.library
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.link.device
    }

    /// Waits until what was asked last is done, or enqueued; aborts the communicator where it is not within `limit`.
    pub fn settle(&self, what: &str, limit: Limit) -> Result<()> {
        let mut pause = PAUSES.0;
        loop {
            match self.state(what)? {
                true => return Ok(()),
                false if Instant::now() >= limit.until => {
                    self.abort(PATIENCE);
                    return Err(limit.expired(what));
                }
                false => {}
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Whether what was asked last is done; its error where it failed, or where a peer did.
    pub fn state(&self, what: &str) -> Result<bool> {
        match self.link.call(|calls, raw| unsafe {
            let mut state = SUCCESS;
            // SAFETY (of the block): the communicator is live; writes one enum.
            match (calls.comm_get_async_error)(raw, &mut state) {
                SUCCESS => state,
                status => status,
            }
        })? {
            IN_PROGRESS => Ok(false),
            status => self.link.checked(status, what).map(|()| true),
        }
    }

    /// Enqueues the gathering of `bytes` bytes from `send` of every rank into `recv`, in rank order.
    ///
    /// # Safety
    /// Device memory of `bytes` and world * `bytes` bytes that stays valid until the stream is done.
    pub unsafe fn all_gather(
        &self,
        send: u64,
        recv: u64,
        bytes: usize,
        stream: &CudaStream,
        limit: Limit,
    ) -> Result<()> {
        let status = self.link.call(|calls, raw| unsafe {
            // SAFETY (of the block): as the caller vouches; the stream is of the same device.
            let (send, recv, stream) = (send as *const c_void, recv as *mut c_void, stream.handle().cast());
            (calls.all_gather)(send, recv, bytes, UINT8, raw, stream)
        })?;
        self.enqueued(status, "ncclAllGather", limit)
    }

    /// Begins to enqueue the reduction of `count` f32 of every rank from `send` to `recv`, which may be the same. It is
    /// enqueued once [`NcclRank::settle`] says so, and nothing may be asked of the rank before.
    ///
    /// # Safety
    /// Device memory of `count` f32 each that stays valid until the stream is done.
    pub unsafe fn begin_all_reduce(
        &self,
        send: u64,
        recv: u64,
        count: usize,
        reduction: Reduction,
        stream: &CudaStream,
    ) -> Result<()> {
        let status = self.link.call(|calls, raw| unsafe {
            // SAFETY (of the block): as the caller vouches; the stream is of the same device.
            let (send, recv, stream) = (send as *const c_void, recv as *mut c_void, stream.handle().cast());
            (calls.all_reduce)(send, recv, count, FLOAT32, reduction as c_int, raw, stream)
        })?;
        match status {
            IN_PROGRESS => Ok(()),
            status => self.link.checked(status, "ncclAllReduce"),
        }
    }

    /// Follows a collective until it is enqueued.
    fn enqueued(&self, status: Status, call: &str, limit: Limit) -> Result<()> {
        match status {
            IN_PROGRESS => self.settle(call, limit),
            status => self.link.checked(status, call),
        }
    }

    /// Ends everything of this rank that is under way; the communicator is of no more use. Goes on behind the caller
    /// where it takes longer than `patience`.
    pub fn abort(&self, patience: Duration) {
        self.link.is_broken.store(true, Ordering::Release);
        let link = Arc::clone(&self.link);
        on_helper(patience, move || link.abort());
    }
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        if self.link.raw.load(Ordering::Acquire).is_null() {
            return;
        }
        let (link, until) = (Arc::clone(&self.link), Instant::now() + self.patience);
        on_helper(PATIENCE, move || link.end(until));
    }
}

impl Link {
    fn new(library: &'static Library, device: &Arc<CudaDevice>) -> Link {
        Link {
            library,
            device: Arc::clone(device),
            raw: AtomicPtr::new(std::ptr::null_mut()),
            calls: Mutex::new(()),
            is_broken: AtomicBool::new(false),
        }
    }

    /// What came of making a communicator.
    fn begun(&self, raw: RawComm, status: Status, call: &str) -> Result<()> {
        self.raw.store(raw, Ordering::Release);
        let begun = match status {
            IN_PROGRESS => Ok(()),
            status => self.library.check(status, call),
        };
        if begun.is_ok() && raw.is_null() {
            let message = format!("{call}: found no communicator, wanted one; NCCL {}", self.library.version());
            return Err(Error::new(ErrorKind::Nccl, message));
        }
        begun.inspect_err(|_| self.abort())
    }

    fn split(&self, borrowed: RawComm, rank: i32) -> Result<()> {
        let entered = self.device.enter()?;
        let (mut raw, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: the borrowed communicator is live, as the caller of `NcclRank::split` vouches; writes one handle.
        let status = unsafe { (self.library.calls.comm_split)(borrowed, 0, rank, &mut raw, &mut config) };
        drop(entered);
        self.begun(raw, status, "ncclCommSplit")
    }

    /// Makes one call, with the context current and no other call under way.
    fn call(&self, call: impl FnOnce(&super::library::Calls, RawComm) -> Status) -> Result<Status> {
        let _alone = self.calls.lock();
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            return Err(Error::new(ErrorKind::Aborted, "NCCL: found the communicator aborted, wanted a live one"));
        }
        let entered: Entered<'_> = self.device.enter()?;
        let status = call(&self.library.calls, raw);
        drop(entered);
        Ok(status)
    }

    /// As [`Library::check`], and remembers a failure.
    fn checked(&self, status: Status, call: &str) -> Result<()> {
        self.library.check(status, call).inspect_err(|_| self.is_broken.store(true, Ordering::Release))
    }

    /// Aborts; may hang. A call that is under way is waited for a while: aborting then ends it.
    fn abort(&self) {
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if raw.is_null() {
            return;
        }
        let alone = self.calls.try_lock_for(PATIENCE / 2);
        if let Ok(entered) = self.device.enter() {
            // SAFETY: the communicator is live, and given up by this call alone. Its result changes nothing.
            unsafe { (self.library.calls.comm_abort)(raw) };
            drop(entered);
        }
        drop(alone);
    }

    /// Ends the communicator: in order, once its work is done and its peers came, else by force. May hang.
    fn end(&self, until: Instant) {
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            return;
        }
        if self.is_broken.load(Ordering::Acquire) || !self.finalize(raw, until) {
            return self.abort();
        }
        if !self.raw.swap(std::ptr::null_mut(), Ordering::AcqRel).is_null()
            && let Ok(entered) = self.device.enter()
        {
            // SAFETY: live, finalised, and given up by this call alone.
            unsafe { (self.library.calls.comm_destroy)(raw) };
            drop(entered);
        }
    }

    /// Whether the communicator was finalised in time.
    fn finalize(&self, raw: RawComm, until: Instant) -> bool {
        let Ok(entered) = self.device.enter() else { return false };
        let calls = &self.library.calls;
        // SAFETY: the communicator is live: only `end` and `abort` give it up.
        let mut state = unsafe { (calls.comm_finalize)(raw) };
        while state == IN_PROGRESS && Instant::now() < until {
            std::thread::sleep(PAUSES.1);
            // SAFETY: as above; writes one enum.
            let status = unsafe { (calls.comm_get_async_error)(raw, &mut state) };
            if status != SUCCESS {
                state = status;
            }
        }
        drop(entered);
        state == SUCCESS
    }
}

/// Runs `body` on a thread of its own and waits for it, at most `patience`. Where no thread is to be had it is left
/// undone.
fn on_helper(patience: Duration, body: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let started = spawn("treeattn-nccl".into(), move || {
        body();
        // Nobody listens any more once the patience is over.
        let _ = done.send(());
    });
    if let Ok(thread) = started
        && wait.recv_timeout(patience) != Err(mpsc::RecvTimeoutError::Timeout)
    {
        // It has nothing left to do; a panic in it was its own end.
        let _ = thread.join();
    }
}
