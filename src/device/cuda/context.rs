//! GPUs and their primary contexts.
//!
//! A [`CudaDevice`] holds the primary context, the one that the CUDA runtime API and every engine uses. It is made
//! current for the length of a call only ([`CudaDevice::enter`]), so a caller's current device never changes.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::driver::{Driver, Fate, Status, driver, fate};
use super::holdings::Item;
use super::module::Module;
use crate::device::{Device, DeviceInfo, DeviceKind};
use crate::error::{Error, ErrorKind, Result};

/// A GPU with its primary context retained. One a process and GPU at a time; shared.
pub(crate) struct CudaDevice {
    pub(super) driver: &'static Driver,
    device: Device,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// Streaming multiprocessors.
    pub units: i32,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Why the context is lost, once it is.
    lost: OnceLock<String>,
    /// Streams that the library knows and has not let go of, to see captures by; a stream may be there twice.
    streams: Mutex<Vec<usize>>,
    /// What could not be freed during a capture.
    pub(super) kept: Mutex<Vec<Item>>,
    /// Modules that some plan has loaded, by the name of their source.
    pub(super) modules: Mutex<Vec<(&'static str, Weak<Module>)>>,
    /// Copies of buffers run here, apart from the caller's work. Null until it is made.
    copies: sys::CUstream,
}

// SAFETY: contexts, streams and device handles may be used from any thread; the mutable parts are locked.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// How many GPUs the driver shows; 0 where there is no driver.
pub(crate) fn count() -> i32 {
    let Ok(driver) = driver() else { return 0 };
    let mut count = 0;
    // SAFETY: writes one int.
    if unsafe { (driver.device_get_count)(&mut count) } == 0 { count.min(65536) } else { 0 }
}

/// The driver that a device needs.
fn driver_of(device: Device) -> Result<&'static Driver> {
    driver().map_err(|error| {
        let message = format!("device: found {device}, wanted a machine with a CUDA driver; {}", error.message());
        Error::new(error.kind(), message)
    })
}

/// What GPU `device` is. Makes no context.
pub(crate) fn info(device: Device) -> Result<DeviceInfo> {
    let driver = driver_of(device)?;
    let handle = handle(driver, device)?;
    let mut name = [0u8; 128];
    let mut memory = 0;
    // SAFETY: writes at most the length of `name`, with a zero at the end, and one size.
    unsafe {
        check(driver, (driver.device_get_name)(name.as_mut_ptr().cast(), 128, handle), "cuDeviceGetName")?;
        check(driver, (driver.device_total_mem)(&mut memory, handle), "cuDeviceTotalMem")?;
    }
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let (major, minor) = capability(driver, handle)?;
    Ok(DeviceInfo {
        device,
        name: String::from_utf8_lossy(name).into_owned(),
        memory: memory as u64,
        units: attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        isa: format!("sm_{major}{minor}"),
    })
}

fn handle(driver: &Driver, device: Device) -> Result<sys::CUdevice> {
    let count = count();
    if device.ordinal < 0 || device.ordinal >= count {
        let message = format!("device: found {device}, wanted one of the {count} CUDA devices that libcuda.so.1 shows");
        return Err(Error::new(ErrorKind::Unavailable, message));
    }
    let mut handle = 0;
    // SAFETY: writes one handle.
    check(driver, unsafe { (driver.device_get)(&mut handle, device.ordinal) }, "cuDeviceGet")?;
    Ok(handle)
}

fn attribute(driver: &Driver, handle: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: writes one int.
    check(driver, unsafe { (driver.device_get_attribute)(&mut value, which, handle) }, "cuDeviceGetAttribute")?;
    Ok(value)
}

fn capability(driver: &Driver, handle: sys::CUdevice) -> Result<(i32, i32)> {
    Ok((
        attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// A failed call, where there is no context to lose.
fn check(driver: &Driver, status: Status, call: &str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let kind = if let Fate::Call(kind) = fate(status) { kind } else { ErrorKind::Cuda };
    Err(Error::new(kind, format!("{call}: found {}, wanted success", driver.describe(status))))
}

impl CudaDevice {
    /// The GPU with its primary context, which is made if nobody uses it yet.
    pub fn get(device: Device) -> Result<Arc<CudaDevice>> {
        static DEVICES: Mutex<Vec<Weak<CudaDevice>>> = Mutex::new(Vec::new());
        debug_assert_eq!(device.kind, DeviceKind::Cuda);
        let driver = driver_of(device)?;
        let mut devices = DEVICES.lock();
        devices.retain(|known| known.strong_count() > 0);
        // A lost context may have been replaced by the caller (cudaDeviceReset): what is made from now on tries anew.
        let alive = |known: &Arc<CudaDevice>| known.device == device && known.lost.get().is_none();
        if let Some(known) = devices.iter().filter_map(Weak::upgrade).find(alive) {
            return Ok(known);
        }
        let is_known_lost = devices.iter().filter_map(Weak::upgrade).any(|known| known.device == device);
        let handle = handle(driver, device)?;
        let units = attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let capability = capability(driver, handle)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle; released on drop.
        check(driver, unsafe { (driver.primary_ctx_retain)(&mut context, handle) }, "cuDevicePrimaryCtxRetain")?;
        let mut new = CudaDevice {
            driver,
            device,
            handle,
            context,
            units,
            capability,
            lost: OnceLock::new(),
            streams: Mutex::new(Vec::new()),
            kept: Mutex::new(Vec::new()),
            modules: Mutex::new(Vec::new()),
            copies: std::ptr::null_mut(),
        };
        let copies = new.enter().and_then(|entered| entered.new_stream());
        new.copies = copies.map_err(|error| match error.kind() {
            // The loss was told before, to whoever met it first.
            ErrorKind::CudaPrior if is_known_lost => Error::new(ErrorKind::CudaFatal, error.message()),
            _ => error,
        })?;
        let new = Arc::new(new);
        devices.push(Arc::downgrade(&new));
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
        // SAFETY: writes one handle; pushing is undone by the guard.
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

    /// As [`CudaDevice::enter`], for calls that allocate or free. `Capturing` while a stream that the library knows is
    /// being captured; captures of other streams are left intact, too.
    pub fn enter_to_change(&self) -> Result<Changing<'_>> {
        let entered = self.enter()?;
        for &stream in &*self.streams.lock() {
            if entered.is_capturing(stream as sys::CUstream)? {
                return Err(capturing("creating, destroying, copying and waiting"));
            }
        }
        let mode = entered.exchange_capture_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
        Ok(Changing { entered, mode })
    }

    /// As [`CudaDevice::enter_to_change`], once no capture forbids it. For threads of the library.
    pub fn enter_between_captures(&self) -> Result<Changing<'_>> {
        loop {
            match self.enter_to_change() {
                Err(error) if error.kind() == ErrorKind::Capturing => std::thread::sleep(Duration::from_millis(2)),
                entered => return entered,
            }
        }
    }

    /// `Capturing` while a capture forbids giving things back; a lost context forbids nothing.
    pub fn check_change(&self) -> Result<()> {
        if self.is_lost() { Ok(()) } else { self.enter_to_change().map(drop) }
    }

    /// Turns a status into an error, and remembers a lost context. No call of the library can lose one by itself, so
    /// what lost it was enqueued before: `CudaPrior`, and `CudaFatal` from then on.
    pub fn check(&self, status: Status, call: &str) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(status, call, ErrorKind::CudaPrior)) }
    }

    /// As [`CudaDevice::check`], for a wait: what lost the context may be the very work that was waited for.
    pub fn check_wait(&self, status: Status, call: &str) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(status, call, ErrorKind::CudaFatal)) }
    }

    #[cold]
    fn failed(&self, status: Status, call: &str, lost: ErrorKind) -> Error {
        let found = self.driver.describe(status);
        let kind = match fate(status) {
            Fate::Call(kind) => {
                return Error::new(kind, format!("{call}: found {found} on {}, wanted success", self.device));
            }
            Fate::Context => lost,
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

    /// Remembers a stream, to see captures by.
    pub(super) fn know(&self, stream: sys::CUstream) {
        self.streams.lock().push(stream as usize);
    }

    /// Forgets a stream.
    pub(super) fn forget(&self, stream: sys::CUstream) {
        let mut streams = self.streams.lock();
        if let Some(at) = streams.iter().position(|&known| known == stream as usize) {
            streams.swap_remove(at);
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.free_kept();
        if let Ok(changing) = self.enter_to_change() {
            // SAFETY: our own stream; nothing that ran on it is waited for elsewhere.
            unsafe { (self.driver.stream_destroy)(self.copies) };
            drop(changing);
        }
        // SAFETY: retained once in `get`. A lost context is released, too; the status changes nothing.
        unsafe { (self.driver.primary_ctx_release)(self.handle) };
    }
}

/// The error of a call that a capture forbids.
pub(super) fn capturing(what: &str) -> Error {
    let message = format!("stream: found a capture under way, wanted none, since it forbids {what}; it is intact");
    Error::new(ErrorKind::Capturing, message)
}

/// The context is current on this thread.
pub(crate) struct Entered<'a> {
    pub(super) device: &'a CudaDevice,
    pushed: bool,
    this_thread: PhantomData<*mut ()>,
}

impl Entered<'_> {
    /// Whether a stream is being captured. Leaves a capture intact.
    pub fn is_capturing(&self, stream: sys::CUstream) -> Result<bool> {
        let mut state = 0;
        // SAFETY: writes one enum, as an unsigned int; the stream is alive, as its owner vouched.
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
        // SAFETY: writes one handle.
        self.device
            .check(unsafe { (self.device.driver.stream_create)(&mut stream, non_blocking) }, "cuStreamCreate")?;
        Ok(stream)
    }

    /// Sets this thread's capture mode and gives the one before.
    fn exchange_capture_mode(&self, mut mode: sys::CUstreamCaptureMode) -> sys::CUstreamCaptureMode {
        // SAFETY: swaps one enum; the driver gives back a mode that was set before, one of the three.
        unsafe { (self.device.driver.thread_exchange_capture_mode)(&mut mode) };
        mode
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: undoes the push of `enter` on this thread, to which the guard is bound.
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
    /// Runs copies and fills that `enqueue` puts on the device's own stream, and waits for them.
    pub(super) fn and_wait(&self, call: &str, enqueue: impl FnOnce(&Driver, sys::CUstream) -> Status) -> Result<()> {
        let device = self.device;
        device.check(enqueue(device.driver, device.copies), call)?;
        // SAFETY: the device's own stream.
        device.check(unsafe { (device.driver.stream_synchronize)(device.copies) }, "cuStreamSynchronize")
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.entered.exchange_capture_mode(self.mode);
    }
}
