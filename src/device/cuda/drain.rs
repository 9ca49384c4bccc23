//! A wait for all work of a GPU that leaves captures intact.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::context::CudaDevice;
use super::resource::Resource;
use crate::error::Result;

/// Waits for all work that this process has enqueued on a GPU, by freeing a byte that is allocated for the purpose: the
/// driver frees memory when all work is done. Synchronising the context would break captures of other threads.
///
/// Dropped unused, it frees the byte as [`super::Allocations`] do.
pub(crate) struct DeviceDrain {
    device: Arc<CudaDevice>,
    data: Option<sys::CUdeviceptr>,
    timeout: Duration,
}

impl DeviceDrain {
    /// Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, timeout: Duration) -> Result<DeviceDrain> {
        let changing = device.enter_to_change()?;
        let mut data = 0;
        // SAFETY: the context is current; the call writes one address to a local.
        device.check(unsafe { (device.driver.mem_alloc)(&mut data, 1) }, "cuMemAlloc")?;
        drop(changing);
        Ok(DeviceDrain { device: Arc::clone(device), data: Some(data), timeout })
    }

    /// Whether a capture would hold [`DeviceDrain::wait`] up.
    pub fn is_held_up(&self) -> bool {
        self.device.check_change().is_err()
    }

    /// Waits until all work of the GPU is done; before that, until no capture forbids it. For threads of the library. The
    /// error is that of a lost context.
    pub fn wait(mut self) -> Result<()> {
        let Some(data) = self.data.take() else { return Ok(()) };
        let changing = self.device.enter_between_captures()?;
        // SAFETY: `new` allocated it in this context, which is current; taken out of `self`, it is freed once.
        self.device.check_wait(unsafe { (self.device.driver.mem_free)(data) }, "cuMemFree")?;
        drop(changing);
        Ok(())
    }
}

impl Drop for DeviceDrain {
    fn drop(&mut self) {
        self.device.free(self.data.take().map(Resource::DeviceMemory).into_iter().collect(), self.timeout);
    }
}
