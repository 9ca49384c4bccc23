//! What several GPUs of a process do with each other's memory.

use super::context::CudaDevice;
use crate::error::{Error, Result};

/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
const ALREADY: u32 = 704;

impl CudaDevice {
    /// Lets kernels of this GPU reach plain allocations of `peer`'s primary context, for as long as both live.
    /// `Unsupported` where the driver says that they cannot; that they can is no proof. Blocks; `Capturing` during a
    /// capture.
    pub fn reach(&self, peer: &CudaDevice) -> Result<()> {
        if self.context() == peer.context() {
            return Ok(());
        }
        let changing = self.enter_to_change()?;
        let mut can = 0;
        // SAFETY: writes one int; the handles are those of live devices.
        let status = unsafe { (self.driver.device_can_access_peer)(&mut can, self.handle(), peer.handle()) };
        self.check(status, "cuDeviceCanAccessPeer")?;
        if can == 0 {
            let found = format!("{} and {}", self.device(), peer.device());
            return Err(Error::unsupported("devices", found, "GPUs that reach each other's memory"));
        }
        // SAFETY: a live context of another device; this one's is current.
        match unsafe { (self.driver.ctx_enable_peer_access)(peer.context(), 0) } {
            ALREADY => {}
            status => self.check(status, "cuCtxEnablePeerAccess")?,
        }
        drop(changing);
        Ok(())
    }
}
