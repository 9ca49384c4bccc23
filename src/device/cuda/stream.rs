//! CUDA streams: ours, or borrowed from the caller.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{CudaDevice, capturing};
use crate::error::{Error, Result};

/// Handles up to this one are not pointers: the default stream (0), its legacy (1) and its per-thread kind (2).
const SPECIAL: usize = 2;

/// A stream of a device's primary context.
pub(crate) struct CudaStream {
    device: Arc<CudaDevice>,
    stream: sys::CUstream,
    owned: bool,
}

// SAFETY: the handle is a number to the driver, which takes it from any thread; the device is Send and Sync.
unsafe impl Send for CudaStream {}
// SAFETY: as above.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// A stream of our own, which does not wait for the legacy default stream. `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>) -> Result<CudaStream> {
        let stream = device.enter_to_change()?.new_stream()?;
        device.add_stream(stream);
        Ok(CudaStream { device: Arc::clone(device), stream, owned: true })
    }

    /// The caller's stream (null: the legacy default stream). It may be captured, before or later.
    ///
    /// # Safety
    /// `stream` is a `CUstream` or `cudaStream_t`, or 0 to 2, and stays alive as long as this object.
    pub unsafe fn wrap(device: &Arc<CudaDevice>, stream: *mut c_void) -> Result<CudaStream> {
        let entered = device.enter()?;
        let stream = stream as sys::CUstream;
        if stream as usize > SPECIAL {
            let mut context = std::ptr::null_mut();
            // SAFETY: the caller gave a live stream; the call writes one handle to a local.
            device.check(unsafe { (device.driver.stream_get_ctx)(stream, &mut context) }, "cuStreamGetCtx")?;
            if context != device.context() {
                let wanted = format!("a stream of the primary context of {}", device.device());
                return Err(Error::invalid("cuda_stream", format_args!("{stream:p}, of another context"), wanted));
            }
        }
        drop(entered);
        device.add_stream(stream);
        Ok(CudaStream { device: Arc::clone(device), stream, owned: false })
    }

    /// The stream's device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// The driver's handle.
    pub fn handle(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until everything enqueued so far is done. `Capturing` during a capture of this stream, which stays intact;
    /// `CudaFatal` where the work lost the context.
    pub fn synchronize(&self) -> Result<()> {
        let entered = self.device.enter()?;
        if entered.is_capturing(self.stream)? {
            return Err(capturing("waiting for the stream"));
        }
        // SAFETY: the context is current. An own stream lives until `drop`, a borrowed one as long as `self`, as the caller of
        // `wrap` promised.
        self.device.check_wait(unsafe { (self.device.driver.stream_synchronize)(self.stream) }, "cuStreamSynchronize")
    }

    /// `Capturing` where destroying this stream must wait for the end of a capture.
    pub fn check_destroy(&self) -> Result<()> {
        if self.owned { self.device.check_change() } else { Ok(()) }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        self.device.remove_stream(self.stream);
        if self.owned
            && let Ok(entered) = self.device.enter()
        {
            // SAFETY: `new` created it, and `drop` runs once; work on it still ends, as cuda.h says.
            unsafe { (self.device.driver.stream_destroy)(self.stream) };
            drop(entered);
        }
    }
}
