//! One rank of an NCCL communicator of the library's own, in which no call blocks beyond a deadline.
//!
//! Calls are non-blocking: they return at once, and [`NcclRank::settle`] follows them to their end. Some calls may hang and
//! cannot be ended: the split of a blocking communicator, the end of a communicator, an abort. Each runs on a thread of its
//! own, which the caller leaves behind when its time is up.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::library::{
    Calls, Config, FLOAT32, IN_PROGRESS, Library, RawComm, SUCCESS, Status, UINT8, UNIQUE_ID_BYTES, UniqueId,
};
use super::rendezvous::Member;
use crate::attention::Shard;
use crate::comm::errors;
use crate::device::cuda::{CudaDevice, CudaStream};
use crate::device::{leave, run_bounded, spawn};
use crate::error::{Error, ErrorKind, Result};

/// How long the end of a communicator keeps its caller.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The first and the longest pause between two looks at a call that goes on.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));
/// The name of the threads on which calls may hang.
const THREAD: &str = "treeattn-nccl";

/// The end of a wait, and what its error says.
#[derive(Clone, Copy)]
pub(crate) struct NcclDeadline {
    pub until: Instant,
    /// The deadline's name in the config, and its length.
    pub field: &'static str,
    pub timeout: Duration,
}

impl NcclDeadline {
    /// `timeout` from now on, called `field`.
    pub fn new(field: &'static str, timeout: Duration) -> NcclDeadline {
        NcclDeadline { until: Instant::now() + timeout, field, timeout }
    }

    /// The error of a wait for `what` that took too long. NCCL does not say for whom.
    pub fn expired(&self, what: &str) -> Error {
        errors::timeout(what, &[], self.field, self.timeout)
    }
}

/// The operation of an allreduce (`ncclRedOp_t`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reduction {
    Sum = 0,
    Maximum = 2,
}

/// One rank of an NCCL communicator that the library made. Any thread may use it; calls are serialised here. Dropping it ends
/// the communicator, and waits for that at most [`END_TIMEOUT`].
pub(crate) struct NcclRank {
    shard: Shard,
    link: Arc<Link>,
    /// How long the other ranks may take to end the communicator in order.
    timeout: Duration,
    /// Unset as long as the communicator has no name.
    member: OnceLock<Member>,
}

/// A communicator of NCCL's, with what its calls need.
struct Link {
    library: &'static Library,
    device: Arc<CudaDevice>,
    /// Null before it is made and once it has been given up. Whoever swaps a pointer for null ends that communicator.
    raw: AtomicPtr<c_void>,
    /// Held during calls: a communicator is not thread-safe.
    calls: Mutex<()>,
    /// Whether it failed: then it can only be aborted.
    is_broken: AtomicBool,
}

impl NcclRank {
    /// Begins to make rank `shard` of the communicator called `id`, which is there once [`NcclRank::settle`] says so. Blocks
    /// for NCCL's own allocations, not for other ranks; `Capturing` during a capture.
    pub fn begin(
        library: &'static Library,
        device: &Arc<CudaDevice>,
        id: &[u8; UNIQUE_ID_BYTES],
        shard: Shard,
        timeout: Duration,
    ) -> Result<NcclRank> {
        let member = OnceLock::from(Member::join(id, shard.rank, &[]));
        let link = Link::new(library, device);
        let mut raw = std::ptr::null_mut();
        let entered = device.enter_to_change()?;
        let mut config = Config::non_blocking();
        // SAFETY: the context is current; the call writes one handle to a local, and copies the config before it returns.
        let status = unsafe {
            (library.calls.comm_init_rank_config)(&mut raw, shard.world, UniqueId(*id), shard.rank, &mut config)
        };
        drop(entered);
        link.begun(raw, status, "ncclCommInitRankConfig")?;
        Ok(NcclRank { shard, link: Arc::new(link), timeout, member })
    }

    /// Which rank of how many an engine's communicator is. `InvalidArgument` where it is one of another GPU.
    ///
    /// # Safety
    /// `borrowed` is a live communicator of `library`, which nobody else uses until this returns.
    pub unsafe fn shard_of(library: &'static Library, device: &Arc<CudaDevice>, borrowed: RawComm) -> Result<Shard> {
        let _entered = device.enter_to_change()?;
        let ask = |call: unsafe extern "C" fn(RawComm, *mut c_int) -> Status, name: &str| {
            let mut value = 0;
            // SAFETY: the caller promises a live communicator that nobody else uses; the call writes one int to a local.
            library.check(unsafe { call(borrowed, &mut value) }, name).map(|()| value)
        };
        let ordinal = ask(library.calls.comm_cu_device, "ncclCommCuDevice")?;
        if ordinal != device.device().ordinal {
            let wanted = format!("cuda:{ordinal}, the device of nccl_comm");
            return Err(Error::invalid("device", device.device(), wanted));
        }
        Ok(Shard {
            rank: ask(library.calls.comm_user_rank, "ncclCommUserRank")?,
            world: ask(library.calls.comm_count, "ncclCommCount")?,
        })
    }

    /// Splits a communicator of all ranks of `borrowed`, which is rank `shard`, off it. Collective over these. Blocks, at most
    /// until `deadline`. After that the borrowed communicator is not used, unless the split itself has not returned: then it
    /// still runs.
    ///
    /// # Safety
    /// `borrowed` is a live communicator of `library`. Nobody else uses it until this returns or, where that is `Timeout`,
    /// until the split has ended.
    pub unsafe fn split(
        library: &'static Library,
        device: &Arc<CudaDevice>,
        borrowed: RawComm,
        shard: Shard,
        deadline: NcclDeadline,
        timeout: Duration,
    ) -> Result<NcclRank> {
        // Where the borrowed one blocks, so does its split, whatever the config of the new one says.
        let (borrowed, its_device) = (borrowed as usize, Arc::clone(device));
        let (done, result) = mpsc::channel();
        let thread = spawn(THREAD.into(), move || {
            let link = Link::new(library, &its_device);
            // SAFETY: the caller of the outer function keeps the communicator alive and unused until this has ended.
            let split = unsafe { link.split(borrowed as RawComm, shard.rank) };
            // A caller that has stopped listening does not want the new communicator any more.
            if let Err(mpsc::SendError((link, _))) = done.send((link, split)) {
                link.abort();
            }
        })?;
        let what = "splitting nccl_comm";
        let left = deadline.until.saturating_duration_since(Instant::now());
        let received = result.recv_timeout(left);
        // The thread ends when it learns that nobody listens.
        drop(result);
        let Ok((link, split)) = received else {
            leave(thread);
            return Err(deadline.expired(what));
        };
        let _ = thread.join();
        split?;
        let rank = NcclRank { shard, link: Arc::new(link), timeout, member: OnceLock::new() };
        rank.settle(what, deadline)?;
        Ok(rank)
    }

    /// Whether this process knows the communicator by a name, by which its ranks find each other.
    pub fn is_named(&self) -> bool {
        self.member.get().is_some()
    }

    /// Names the communicator, of which the ranks `members` are in this process: they meet before each exchange from now on.
    pub fn name(&self, id: &[u8; UNIQUE_ID_BYTES], members: &[i32]) {
        self.member.get_or_init(|| Member::join(id, self.shard.rank, members));
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

    /// Waits until the last call is done, or enqueued. Where it is not by `deadline`, aborts the communicator: `Timeout`. No
    /// context is current and no lock held between two looks.
    pub fn settle(&self, what: &str, deadline: NcclDeadline) -> Result<()> {
        let mut pause = PAUSES.0;
        while !self.state(what)? {
            if Instant::now() >= deadline.until {
                self.abort(END_TIMEOUT);
                return Err(deadline.expired(what));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
        Ok(())
    }

    /// Whether the last call is done; its error where it failed, or where a peer did. Does not block.
    pub fn state(&self, what: &str) -> Result<bool> {
        let status = self.link.call(|calls, raw| {
            let mut state = SUCCESS;
            // SAFETY: `call` passes a live communicator, with its context current; the call writes one enum to a local.
            match unsafe { (calls.comm_get_async_error)(raw, &mut state) } {
                SUCCESS => state,
                status => status,
            }
        })?;
        match status {
            IN_PROGRESS => Ok(false),
            status => self.link.checked(status, what).map(|()| true),
        }
    }

    /// Enqueues the gathering of `bytes` bytes from `send` of every rank into `recv`, in rank order. For setup: first waits,
    /// until `deadline`, for the ranks of this process, so that no kernel waits on a GPU for a rank that is not ready to launch
    /// its own.
    ///
    /// # Safety
    /// `send` and `recv` are memory of this rank's device, of `bytes` and world * `bytes` bytes, which nobody else uses until
    /// the stream, one of the same device, is done.
    pub unsafe fn all_gather(
        &self,
        send: u64,
        recv: u64,
        bytes: usize,
        stream: &CudaStream,
        deadline: NcclDeadline,
    ) -> Result<()> {
        self.meet("setup exchange", deadline)?;
        // SAFETY: this function was promised the same.
        unsafe { self.begin_all_gather(send, recv, bytes, stream) }?;
        self.settle("ncclAllGather", deadline)
    }

    /// Begins to enqueue the gathering of `bytes` bytes from `send` of every rank into `recv`, in rank order. It is enqueued once
    /// [`NcclRank::settle`] says so, and nothing may be asked of the rank before.
    ///
    /// # Safety
    /// As [`NcclRank::all_gather`].
    pub unsafe fn begin_all_gather(&self, send: u64, recv: u64, bytes: usize, stream: &CudaStream) -> Result<()> {
        let status = self.link.call(|calls, raw| {
            let (send, recv, stream) = (send as *const c_void, recv as *mut c_void, stream.handle().cast());
            // SAFETY: `call` passes a live communicator, with its context current; the stream is borrowed; the caller promises
            // the memory.
            unsafe { (calls.all_gather)(send, recv, bytes, UINT8, raw, stream) }
        })?;
        self.begun(status, "ncclAllGather")
    }

    /// Waits until all ranks of this process are here, where they have a name to find each other by.
    fn meet(&self, what: &str, deadline: NcclDeadline) -> Result<()> {
        let Some(member) = self.member.get() else { return Ok(()) };
        member.wait(deadline.until, || self.state(what).map(drop))?.map_err(|missing| {
            self.abort(END_TIMEOUT);
            errors::timeout(what, &[missing as usize], deadline.field, deadline.timeout)
        })
    }

    /// Begins to enqueue the reduction of `count` f32 of every rank from `send` to `recv`, which may be the same. It is
    /// enqueued once [`NcclRank::settle`] says so, and nothing may be asked of the rank before.
    ///
    /// # Safety
    /// `send` and `recv` are memory of this rank's device, of `count` f32 each, which nobody else uses until the stream, one
    /// of the same device, is done.
    pub unsafe fn begin_all_reduce(
        &self,
        send: u64,
        recv: u64,
        count: usize,
        reduction: Reduction,
        stream: &CudaStream,
    ) -> Result<()> {
        let status = self.link.call(|calls, raw| {
            let (send, recv, stream) = (send as *const c_void, recv as *mut c_void, stream.handle().cast());
            // SAFETY: `call` passes a live communicator, with its context current; the stream is borrowed; the caller promises
            // the memory.
            unsafe { (calls.all_reduce)(send, recv, count, FLOAT32, reduction as c_int, raw, stream) }
        })?;
        self.begun(status, "ncclAllReduce")
    }

    /// What a collective says that may still be under way.
    fn begun(&self, status: Status, call: &str) -> Result<()> {
        match status {
            IN_PROGRESS => Ok(()),
            status => self.link.checked(status, call),
        }
    }

    /// Ends everything of this rank that is under way; the communicator is of no more use. Keeps its caller at most
    /// `timeout`.
    pub fn abort(&self, timeout: Duration) {
        self.link.is_broken.store(true, Ordering::Release);
        let link = Arc::clone(&self.link);
        run_bounded(THREAD, timeout, move || link.abort());
    }
}

impl Drop for NcclRank {
    fn drop(&mut self) {
        if self.link.raw.load(Ordering::Acquire).is_null() {
            return;
        }
        let (link, until) = (Arc::clone(&self.link), Instant::now() + self.timeout);
        run_bounded(THREAD, END_TIMEOUT, move || link.end(until));
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

    /// Takes over the communicator that `call` began to make, or tells why it did not.
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

    /// Splits a communicator off `borrowed`. May hang.
    ///
    /// # Safety
    /// `borrowed` is a live communicator of the library, which nobody else uses until this returns.
    unsafe fn split(&self, borrowed: RawComm, rank: i32) -> Result<()> {
        let entered = self.device.enter()?;
        let (mut raw, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: the caller promises the borrowed communicator; the context is current; the call writes one handle to a
        // local, and copies the config before it returns.
        let status = unsafe { (self.library.calls.comm_split)(borrowed, 0, rank, &mut raw, &mut config) };
        drop(entered);
        self.begun(raw, status, "ncclCommSplit")
    }

    /// Makes one call, with the context current and no other call under way. `Aborted` once the communicator is given up.
    fn call(&self, call: impl FnOnce(&Calls, RawComm) -> Status) -> Result<Status> {
        let _alone = self.calls.lock();
        let raw = self.raw.load(Ordering::Acquire);
        if raw.is_null() {
            return Err(Error::new(ErrorKind::Aborted, "NCCL: found the communicator aborted, wanted a live one"));
        }
        let entered = self.device.enter()?;
        let status = call(&self.library.calls, raw);
        drop(entered);
        Ok(status)
    }

    /// As [`Library::check`], and remembers a failure.
    fn checked(&self, status: Status, call: &str) -> Result<()> {
        self.library.check(status, call).inspect_err(|_| self.is_broken.store(true, Ordering::Release))
    }

    /// Aborts the communicator. May hang. A call that is under way gets a while to end; then the abort ends it.
    fn abort(&self) {
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if raw.is_null() {
            return;
        }
        let alone = self.calls.try_lock_for(END_TIMEOUT / 2);
        if let Ok(entered) = self.device.enter() {
            // SAFETY: the swap above made this the only call that ends the communicator, which is live; the context is
            // current. NCCL allows an abort beside a call that hangs. Nothing is left to do where it fails.
            unsafe { (self.library.calls.comm_abort)(raw) };
            drop(entered);
        }
        drop(alone);
    }

    /// Ends the communicator: in order if its work is done and its peers come by `until`, else by an abort. May hang.
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
            // SAFETY: the swap made this the only call that ends the communicator, which is live and finalised; the context
            // is current.
            unsafe { (self.library.calls.comm_destroy)(raw) };
            drop(entered);
        }
    }

    /// Whether the communicator was finalised by `until`. Only for [`Link::end`], which runs once the owner is gone and only
    /// where `is_broken` is not set. Every abort sets that first, so that none runs beside this.
    fn finalize(&self, raw: RawComm, until: Instant) -> bool {
        let Ok(entered) = self.device.enter() else { return false };
        let calls = &self.library.calls;
        // SAFETY: the communicator is live, since nothing else can end it now; the context is current.
        let mut state = unsafe { (calls.comm_finalize)(raw) };
        while state == IN_PROGRESS && Instant::now() < until {
            std::thread::sleep(PAUSES.1);
            // SAFETY: as above; the call writes one enum to a local.
            let status = unsafe { (calls.comm_get_async_error)(raw, &mut state) };
            if status != SUCCESS {
                state = status;
            }
        }
        drop(entered);
        state == SUCCESS
    }
}
