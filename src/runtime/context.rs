//! The runtime object: what a process sets up once.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

use crate::cpu::{self, Isa};
use crate::cuda::Merge;
use crate::device::cuda::CudaDevice;
use crate::device::{self, Device, DeviceInfo, DeviceKind, count_forks, environment};
use crate::error::{Error, ErrorKind, Result};

/// How weighty a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum LogLevel {
    /// Something failed.
    Error = 1,
    /// Something works, but not as asked.
    Warning = 2,
    /// A choice the library made.
    Info = 3,
}

/// Receives log lines; may be called from any thread, and must not call the library.
pub type LogCallback = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// What a runtime is created with.
#[derive(Clone, Debug, Default)]
pub struct RuntimeConfig {
    /// The CPU instruction set to use: "scalar", "avx2", "avx512" or "neon". None: what `TREEATTN_CPU_ISA` said when the process
    /// made its first runtime, else the best.
    pub cpu_isa: Option<String>,
}

/// What work needs on a GPU, as long as somebody keeps it.
pub(crate) type Resident = Arc<dyn Any + Send + Sync>;

/// A process's use of the library. Clones are the same runtime. Any thread may use it.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    closed: AtomicBool,
    isa: Isa,
    log: Mutex<Option<Arc<LogReceiver>>>,
    /// The kernels that merge given partials, one a GPU, which streams keep.
    merges: Mutex<Vec<Weak<Merge>>>,
}

/// A receiver of log lines, with the calls of it that are under way: no lock is held during one.
struct LogReceiver {
    callback: LogCallback,
    calls: Mutex<usize>,
    idle: Condvar,
}

/// A call that is under way for as long as this lives.
struct LogCall(Arc<LogReceiver>);

impl LogCall {
    fn new(receiver: &Arc<LogReceiver>) -> LogCall {
        *receiver.calls.lock() += 1;
        LogCall(Arc::clone(receiver))
    }
}

impl Drop for LogCall {
    fn drop(&mut self) {
        let mut calls = self.0.calls.lock();
        *calls -= 1;
        if *calls == 0 {
            self.0.idle.notify_all();
        }
    }
}

impl Runtime {
    /// A runtime. An instruction set that this machine lacks is `Unavailable`.
    pub fn new(config: RuntimeConfig) -> Result<Runtime> {
        // All of it, here: later another thread of the engine may change it.
        environment();
        count_forks()?;
        let isa = match &config.cpu_isa {
            Some(name) => Isa::by_name("cpu_isa", name)?,
            None => cpu::isa(),
        };
        let inner = Inner { closed: AtomicBool::new(false), isa, log: Mutex::default(), merges: Mutex::default() };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// Ends the runtime: calls on objects made from it return `ParentDestroyed` from now on.
    pub fn close(&self) {
        self.inner.closed.store(true, Ordering::Release);
    }

    /// Sets or removes the receiver of log lines. Returns when no call of the former one is under way.
    pub fn set_log_callback(&self, callback: Option<LogCallback>) -> Result<()> {
        self.check_open()?;
        let receiver =
            callback.map(|callback| Arc::new(LogReceiver { callback, calls: Mutex::new(0), idle: Condvar::new() }));
        let former = std::mem::replace(&mut *self.inner.log.lock(), receiver);
        if let Some(former) = former {
            let mut calls = former.calls.lock();
            while *calls > 0 {
                former.idle.wait(&mut calls);
            }
        }
        Ok(())
    }

    /// How many devices of `kind` there are.
    pub fn device_count(&self, kind: DeviceKind) -> Result<i32> {
        self.check_open()?;
        Ok(device::device_count(kind))
    }

    /// What `device` is.
    pub fn device_info(&self, device: Device) -> Result<DeviceInfo> {
        self.check_open()?;
        let mut info = device::device_info(device)?;
        if device.kind == DeviceKind::Cpu {
            info.isa = self.inner.isa.describe();
        }
        Ok(info)
    }

    /// The CPU instruction set in use.
    pub fn cpu_isa(&self) -> Isa {
        self.inner.isa
    }

    /// Tells the receiver of log lines, on this thread. Not to be called under a lock.
    pub(crate) fn log(&self, level: LogLevel, message: &str) {
        // Counted under the lock, so that who replaces the receiver sees every call of it; called without.
        let call = self.inner.log.lock().as_ref().map(LogCall::new);
        if let Some(call) = call {
            (call.0.callback)(level, message);
        }
    }

    /// Loads what calls without a plan launch on `device`, for a stream to keep. None where that cannot be now, since a capture
    /// forbids it or a build has no kernels: then the first such call loads it.
    pub(crate) fn prepare(&self, device: &Arc<CudaDevice>) -> Option<Resident> {
        self.merge_kernel(device).ok().map(|kernel| kernel as Resident)
    }

    /// The kernel that merges given partials on `device`, for a stream to keep. Loads it unless a stream has it; then `Capturing`
    /// during a capture.
    pub(crate) fn merge_kernel(&self, device: &Arc<CudaDevice>) -> Result<Arc<Merge>> {
        // Held while loading: another call gets this kernel instead of a second one.
        let mut kept = self.inner.merges.lock();
        kept.retain(|known| known.strong_count() > 0);
        if let Some(known) = kept.iter().filter_map(Weak::upgrade).find(|known| Arc::ptr_eq(known.device(), device)) {
            return Ok(known);
        }
        let merge = Arc::new(Merge::new(device)?);
        kept.push(Arc::downgrade(&merge));
        Ok(merge)
    }

    /// `ParentDestroyed` once the runtime is closed.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.inner.closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::ParentDestroyed, "runtime: found destroyed, wanted a live runtime"));
        }
        Ok(())
    }

    /// Checks that `device` exists and can run plans.
    pub(crate) fn check_device(&self, device: Device) -> Result<()> {
        self.check_open()?;
        device::device_info(device).map(|_| ())
    }
}
