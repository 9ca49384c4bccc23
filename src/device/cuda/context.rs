//! The primary context of a GPU.
//!
//! A [`CudaDevice`] holds the primary context, the one that the CUDA runtime API and every engine uses. A call makes it
//! current for its own length only ([`CudaDevice::enter`]), so that the caller's current context never changes.
//!
//! Calls that allocate or free go through [`CudaDevice::enter_to_change`], which refuses during a capture. What cannot be
//! freed because of a capture is deferred to the next change.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::driver::{Driver, Meaning, Status, meaning};
use super::query;
use super::resource::{LoadedModule, Resource};
use crate::device::identity::{Device, DeviceKind};
use crate::device::thread::run_bounded;
use crate::error::{Error, ErrorKind, Result};

/// A GPU with its primary context retained. One object a process and GPU at a time, shared. Any thread may use it.
pub(crate) struct CudaDevice {
    pub(super) driver: &'static Driver,
    device: Device,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// Streaming multiprocessors.
    pub units: i32,
    /// Compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Why the context is lost, once it is.
    lost: OnceLock<String>,
    /// Streams that the library uses: a capture of one of them forbids changes. A stream may be there twice.
    streams: Mutex<Vec<usize>>,
    /// What a capture kept from being freed.
    deferred: Mutex<Vec<Resource>>,
    /// Modules that plans have loaded.
    pub(super) modules: Mutex<Vec<LoadedModule>>,
    /// The library's own copies and fills run here, apart from the caller's work. Null while it is made.
    copies: sys::CUstream,
}

// SAFETY: contexts, streams and device handles may be used from any thread; the mutable parts are locked; `copies` is
// written before the object is shared.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// The objects of a GPU that are still there: the live one, and those whose context is lost.
type Instances = Vec<Weak<CudaDevice>>;

/// The instances of one GPU, under a lock of their own: making a context may take long, and must not hold up other GPUs.
fn instances(device: Device) -> Arc<Mutex<Instances>> {
    static ALL: Mutex<Vec<(i32, Arc<Mutex<Instances>>)>> = Mutex::new(Vec::new());
    let mut all = ALL.lock();
    if let Some((_, known)) = all.iter().find(|(ordinal, _)| *ordinal == device.ordinal) {
        return Arc::clone(known);
    }
    let new = Arc::default();
    all.push((device.ordinal, Arc::clone(&new)));
    new
}

impl CudaDevice {
    /// The GPU with its primary context, which is made if nobody uses it yet. Errors: `Unavailable` where there is no driver
    /// or no such GPU; what the driver says.
    pub fn get(device: Device) -> Result<Arc<CudaDevice>> {
        debug_assert_eq!(device.kind, DeviceKind::Cuda);
        let driver = query::driver_for(device)?;
        let instances = instances(device);
        let mut instances = instances.lock();
        let known: Vec<Arc<CudaDevice>> = instances.iter().filter_map(Weak::upgrade).collect();
        // The caller may have replaced a lost context (cudaDeviceReset), so that what is made from now on is made on a new one.
        if let Some(alive) = known.iter().find(|known| !known.is_lost()) {
            return Ok(Arc::clone(alive));
        }
        let new = Arc::new(CudaDevice::retain(driver, device).map_err(|error| match error.kind() {
            // The loss was reported before, to whoever met it first.
            ErrorKind::CudaPrior if !known.is_empty() => Error::new(ErrorKind::CudaFatal, error.message()),
            _ => error,
        })?);
        instances.retain(|known| known.strong_count() > 0);
        instances.push(Arc::downgrade(&new));
        Ok(new)
    }

    fn retain(driver: &'static Driver, device: Device) -> Result<CudaDevice> {
        let handle = query::handle(driver, device)?;
        let units = query::multiprocessors(driver, handle)?;
        let compute_capability = query::compute_capability(driver, handle)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `handle` is the driver's own; the call writes one handle to a local. `drop` releases what it retains.
        query::check(driver, unsafe { (driver.primary_ctx_retain)(&mut context, handle) }, "cuDevicePrimaryCtxRetain")?;
        let mut new = CudaDevice {
            driver,
            device,
            handle,
            context,
            units,
            compute_capability,
            lost: OnceLock::new(),
            streams: Mutex::new(Vec::new()),
            deferred: Mutex::new(Vec::new()),
            modules: Mutex::new(Vec::new()),
            copies: std::ptr::null_mut(),
        };
        new.copies = new.enter().and_then(|entered| entered.new_stream())?;
        Ok(new)
    }

    /// Which device this is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The driver's handle.
    pub(super) fn handle(&self) -> sys::CUdevice {
        self.handle
    }

    /// The primary context.
    pub fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// Makes the context current on this thread until the guard is dropped. `CudaFatal` once the context is lost.
    pub fn enter(&self) -> Result<Entered<'_>> {
        if let Some(why) = self.lost.get() {
            return Err(Error::new(ErrorKind::CudaFatal, why.clone()));
        }
        let mut current = std::ptr::null_mut();
        // SAFETY: the first call writes one handle to a local; `self.context` is retained as long as `self` lives, and the
        // guard, which borrows `self`, undoes the push.
        let pushed = unsafe {
            (self.driver.ctx_get_current)(&mut current);
            if current == self.context {
                false
            } else {
                self.check((self.driver.ctx_push_current)(self.context), "cuCtxPushCurrent")?;
                true
            }
        };
        Ok(Entered { device: self, pushed, this_thread: PhantomData })
    }

    /// As [`CudaDevice::enter`], for calls that allocate or free. `Capturing` while a stream that the library uses is
    /// being captured. A capture of another stream stays intact: allocating in relaxed mode does not break it.
    pub fn enter_to_change(&self) -> Result<Changing<'_>> {
        let entered = self.enter()?;
        // The lock keeps each stream from being destroyed while it is asked.
        for &stream in &*self.streams.lock() {
            if entered.is_capturing(stream as sys::CUstream)? {
                return Err(capturing("creating, destroying, copying and waiting"));
            }
        }
        let mode = entered.exchange_capture_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
        Ok(Changing { entered, mode })
    }

    /// As [`CudaDevice::enter_to_change`], once no capture forbids it. For threads of the library: the caller's own thread
    /// may be the one that ends the capture.
    pub fn enter_between_captures(&self) -> Result<Changing<'_>> {
        loop {
            match self.enter_to_change() {
                Err(error) if error.kind() == ErrorKind::Capturing => std::thread::sleep(Duration::from_millis(2)),
                entered => return entered,
            }
        }
    }

    /// `Capturing` while a capture forbids freeing; a lost context forbids nothing.
    pub fn check_change(&self) -> Result<()> {
        if self.is_lost() { Ok(()) } else { self.enter_to_change().map(drop) }
    }

    /// Turns a status into an error, and remembers a lost context. No call of the library can lose a context by itself:
    /// work that was enqueued before did, hence `CudaPrior`, and `CudaFatal` from then on.
    pub fn check(&self, status: Status, call: &str) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(status, call, ErrorKind::CudaPrior)) }
    }

    /// As [`CudaDevice::check`], for a wait: the work that was waited for may be what lost the context. `CudaFatal`.
    pub fn check_wait(&self, status: Status, call: &str) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(status, call, ErrorKind::CudaFatal)) }
    }

    #[cold]
    fn failed(&self, status: Status, call: &str, lost: ErrorKind) -> Error {
        let found = self.driver.describe(status);
        let kind = match meaning(status) {
            Meaning::Call(kind) => {
                return Error::new(kind, format!("{call}: found {found} on {}, wanted success", self.device));
            }
            Meaning::Context => lost,
        };
        let why = format!("{call}: found {found}, wanted success; the CUDA context of {} is lost", self.device);
        // The first loss counts; every later call is told of it.
        let why = self.lost.get_or_init(|| why);
        match kind {
            ErrorKind::CudaPrior => Error::new(kind, format!("{why} by work that was enqueued before this call")),
            kind => Error::new(kind, why.clone()),
        }
    }

    /// Whether the context is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    /// Counts a stream among those whose captures forbid changes.
    pub(super) fn add_stream(&self, stream: sys::CUstream) {
        self.streams.lock().push(stream as usize);
    }

    /// Forgets a stream, which its owner may destroy from then on.
    pub(super) fn remove_stream(&self, stream: sys::CUstream) {
        let mut streams = self.streams.lock();
        if let Some(at) = streams.iter().position(|&known| known == stream as usize) {
            streams.swap_remove(at);
        }
    }

    /// Frees `resources`, in order, on a thread that keeps the caller at most `timeout`: the driver waits for the work that
    /// may use them. During a capture they are deferred, since the graph may be about to use them; a lost context took
    /// them along.
    pub(super) fn free(self: &Arc<Self>, resources: Vec<Resource>, timeout: Duration) {
        if resources.is_empty() {
            return;
        }
        match self.enter_to_change() {
            Ok(changing) => {
                drop(changing);
                self.deferred.lock().extend(resources);
                let device = Arc::clone(self);
                run_bounded("treeattn-free", timeout, move || device.free_deferred());
            }
            Err(error) if error.kind() == ErrorKind::Capturing => self.deferred.lock().extend(resources),
            Err(_) => {}
        }
    }

    /// Frees what was deferred, unless a capture forbids it still.
    fn free_deferred(&self) {
        let Ok(changing) = self.enter_to_change() else { return };
        let resources = std::mem::take(&mut *self.deferred.lock());
        for resource in resources {
            // SAFETY: the context is current until `changing` is dropped. Whoever deferred the resource had made it in this
            // context and gave its only handle up; the driver itself waits for work that is enqueued.
            unsafe { resource.release(self.driver) };
        }
        drop(changing);
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.free_deferred();
        if !self.copies.is_null()
            && let Ok(changing) = self.enter_to_change()
        {
            // SAFETY: made by `retain` and handed to nobody; every use waited for its end.
            unsafe { (self.driver.stream_destroy)(self.copies) };
            drop(changing);
        }
        // SAFETY: `retain` retained it once. A lost context is released, too; nothing is left to do if that fails.
        unsafe { (self.driver.primary_ctx_release)(self.handle) };
    }
}

/// The error of a call that a capture forbids.
pub(super) fn capturing(what: &str) -> Error {
    let message = format!("stream: found a capture under way, wanted none, since it forbids {what}; it is intact");
    Error::new(ErrorKind::Capturing, message)
}

/// The context is current on this thread, to which the guard is bound.
pub(crate) struct Entered<'a> {
    pub(super) device: &'a CudaDevice,
    pushed: bool,
    this_thread: PhantomData<*mut ()>,
}

impl Entered<'_> {
    /// Whether a stream is being captured. Leaves a capture intact.
    pub fn is_capturing(&self, stream: sys::CUstream) -> Result<bool> {
        let mut state = 0;
        // SAFETY: the call writes one enum, an unsigned int, to a local. Streams come from a `CudaStream`, which is borrowed
        // or, in the list of the device, removed before the stream is destroyed; the caller of `CudaStream::wrap` keeps a
        // borrowed one alive as long as that object.
        match unsafe { (self.device.driver.stream_is_capturing)(stream, &mut state) } {
            // The legacy stream answers with CUDA_ERROR_STREAM_CAPTURE_IMPLICIT while it must not be touched.
            906 => Ok(true),
            status => self.device.check(status, "cuStreamIsCapturing").map(|()| state != 0),
        }
    }

    /// A stream that does not wait for the legacy stream.
    pub(super) fn new_stream(&self) -> Result<sys::CUstream> {
        let mut stream = std::ptr::null_mut();
        let non_blocking = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the call writes one handle to a local.
        let status = unsafe { (self.device.driver.stream_create)(&mut stream, non_blocking) };
        self.device.check(status, "cuStreamCreate")?;
        Ok(stream)
    }

    /// Sets this thread's capture mode and gives the one before.
    fn exchange_capture_mode(&self, mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
        // SAFETY: the call swaps one enum with a local; what it writes is the mode that was set before, which is one of the
        // three that the type has.
        unsafe { (self.device.driver.thread_exchange_capture_mode)(&mut mode) };
        mode
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: undoes the push of `enter`: the guard is not Send, so that this is the same thread, and guards end in
            // reverse order. The call writes one handle to a local.
            unsafe { (self.device.driver.ctx_pop_current)(&mut popped) };
        }
    }
}

/// The context is current, and allocating does not disturb captures of other threads.
pub(crate) struct Changing<'a> {
    entered: Entered<'a>,
    mode: sys::CUstreamCaptureMode,
}

impl<'a> std::ops::Deref for Changing<'a> {
    type Target = Entered<'a>;

    fn deref(&self) -> &Entered<'a> {
        &self.entered
    }
}

impl Changing<'_> {
    /// Enqueues copies or fills on the library's own stream, by `enqueue`, and waits for them.
    pub(super) fn and_wait(&self, call: &str, enqueue: impl FnOnce(&Driver, sys::CUstream) -> Status) -> Result<()> {
        let device = self.device;
        device.check(enqueue(device.driver, device.copies), call)?;
        // SAFETY: `copies` lives as long as the device, whose context is current.
        device.check(unsafe { (device.driver.stream_synchronize)(device.copies) }, "cuStreamSynchronize")
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.entered.exchange_capture_mode(self.mode);
    }
}
