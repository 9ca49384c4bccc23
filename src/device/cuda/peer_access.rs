//! Access of GPUs to each other's memory, within a process and between processes.

use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Changing, CudaDevice};
use crate::error::{Error, ErrorKind, Result};

/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
const ALREADY_ENABLED: u32 = 704;
/// `CUDA_ERROR_INVALID_CONTEXT`: `cuIpcOpenMemHandle` gives it where the exporting process is in another PID namespace.
const INVALID_CONTEXT: u32 = 201;

/// Bytes of the handle by which another process opens memory of this one.
pub(crate) const HANDLE_BYTES: usize = 64;
/// The size of an allocation that is shared is rounded up to this: it then has a block of the driver's for itself and begins
/// where the block does, as handles demand.
pub(crate) const SHARED_ALIGN: usize = 2 << 20;

/// Memory of another process, mapped for this GPU. Dropping it unmaps it.
pub(crate) struct Imported {
    device: Arc<CudaDevice>,
    /// 0 where nothing is mapped.
    address: u64,
}

impl Imported {
    /// The address of the first byte for kernels of this GPU; 0 where nothing is mapped.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Nothing mapped: not yet, or it could not be.
    pub fn none(device: &Arc<CudaDevice>) -> Imported {
        Imported { device: Arc::clone(device), address: 0 }
    }

    /// Whether anything is mapped.
    pub fn is_mapped(&self) -> bool {
        self.address != 0
    }

    /// Unmaps it, once no capture forbids that. For threads of the library.
    pub fn close(mut self) {
        let device = Arc::clone(&self.device);
        if let Ok(changing) = device.enter_between_captures() {
            self.unmap(&changing);
        }
    }

    /// `changing`: the device's context is current.
    fn unmap(&mut self, _changing: &Changing<'_>) {
        if self.is_mapped() {
            // SAFETY: `import` opened the address in this context, which is current; it is 0 from now on, so that it is
            // closed once. Kernels that still use it are the caller's to wait for first.
            unsafe { (self.device.driver.ipc_close_mem_handle)(std::mem::take(&mut self.address)) };
        }
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        // A lost context took the mapping along. During a capture the mapping stays until the process ends.
        let device = Arc::clone(&self.device);
        if let Ok(changing) = device.enter_to_change() {
            self.unmap(&changing);
        }
    }
}

impl CudaDevice {
    /// Lets kernels of this GPU access plain allocations of `peer`'s primary context, for as long as both live. `Unsupported`
    /// where the driver says that they cannot. Where it says that they can, that is no proof. Blocks; `Capturing` during a
    /// capture.
    pub fn enable_access_to(&self, peer: &CudaDevice) -> Result<()> {
        if self.context() == peer.context() {
            return Ok(());
        }
        let changing = self.enter_to_change()?;
        let mut can = 0;
        // SAFETY: both handles came from cuDeviceGet; the call writes one int to a local.
        let status = unsafe { (self.driver.device_can_access_peer)(&mut can, self.handle(), peer.handle()) };
        self.check(status, "cuDeviceCanAccessPeer")?;
        if can == 0 {
            let found = format!("{} and {}", self.device(), peer.device());
            return Err(Error::unsupported("devices", found, "GPUs that reach each other's memory"));
        }
        // SAFETY: this device's context is current; that of `peer` is retained as long as `peer`, which is borrowed.
        match unsafe { (self.driver.ctx_enable_peer_access)(peer.context(), 0) } {
            ALREADY_ENABLED => {}
            status => self.check(status, "cuCtxEnablePeerAccess")?,
        }
        drop(changing);
        Ok(())
    }

    /// The handle by which other processes of this machine open the allocation at `address`, whose size is a multiple of
    /// [`SHARED_ALIGN`].
    pub fn export(&self, address: u64) -> Result<[u8; HANDLE_BYTES]> {
        let entered = self.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: the context is current; the call writes one handle to a local, and an error for an address that it does not
        // know.
        self.check(unsafe { (self.driver.ipc_get_mem_handle)(&mut handle, address) }, "cuIpcGetMemHandle")?;
        drop(entered);
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Maps memory of another process. `Unsupported` where the driver refuses, as it does between GPUs without peer access and
    /// across PID namespaces. Blocks; `Capturing` during a capture.
    pub fn import(self: &Arc<Self>, handle: &[u8; HANDLE_BYTES]) -> Result<Imported> {
        let changing = self.enter_to_change()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let (mut address, peer_access) = (0, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
        // SAFETY: the context is current; the driver checks the handle, and writes one address to a local.
        let status = unsafe { (self.driver.ipc_open_mem_handle)(&mut address, handle, peer_access) };
        let refused = |why: &str| {
            let found = format!("{} and a GPU of another process ({why})", self.device());
            Error::unsupported("device", found, "GPUs that reach each other's memory")
        };
        if status == INVALID_CONTEXT {
            // This context is valid: the process is of another PID namespace.
            return Err(refused("cuIpcOpenMemHandle gave CUDA_ERROR_INVALID_CONTEXT"));
        }
        self.check(status, "cuIpcOpenMemHandle")
            .map_err(|error| if error.kind() == ErrorKind::Cuda { refused(error.message()) } else { error })?;
        drop(changing);
        Ok(Imported { device: Arc::clone(self), address })
    }
}
