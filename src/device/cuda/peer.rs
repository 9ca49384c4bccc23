//! What GPUs do with each other's memory, in a process and between processes.

use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Changing, CudaDevice};
use crate::error::{Error, ErrorKind, Result};

/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
const ALREADY: u32 = 704;
/// `CUDA_ERROR_INVALID_CONTEXT`, which `cuIpcOpenMemHandle` also gives where processes do not see each other.
const ELSEWHERE: u32 = 201;

/// Bytes by which another process opens memory of this one.
pub(crate) const HANDLE_BYTES: usize = 64;
/// What an allocation's size is rounded up to before it is shared, so that it shares a block of the driver with nothing
/// else, and begins where the block does.
pub(crate) const SHARED_ALIGN: usize = 2 << 20;

/// Memory of another process, as this GPU sees it. Closed when dropped.
pub(crate) struct Imported {
    device: Arc<CudaDevice>,
    /// 0 where it is not open.
    address: u64,
}

impl Imported {
    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// None yet, or none that could be opened.
    pub fn shut(device: &Arc<CudaDevice>) -> Imported {
        Imported { device: Arc::clone(device), address: 0 }
    }

    /// Whether there is any.
    pub fn is_open(&self) -> bool {
        self.address != 0
    }

    /// Closes it, once no capture forbids that. For threads of the library.
    pub fn close(mut self) {
        let device = Arc::clone(&self.device);
        if let Ok(changing) = device.enter_between_captures() {
            self.end(&changing);
        }
    }

    fn end(&mut self, _changing: &Changing<'_>) {
        if self.is_open() {
            // SAFETY: opened once, and closed once.
            unsafe { (self.device.driver.ipc_close_mem_handle)(std::mem::take(&mut self.address)) };
        }
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        // A lost context took it along; during a capture it stays until the process ends.
        let device = Arc::clone(&self.device);
        if let Ok(changing) = device.enter_to_change() {
            self.end(&changing);
        }
    }
}

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

    /// What opens the allocation at `address` in other processes of this machine. Its size is a multiple of
    /// [`SHARED_ALIGN`].
    pub fn export(&self, address: u64) -> Result<[u8; HANDLE_BYTES]> {
        let entered = self.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: writes one handle.
        self.check(unsafe { (self.driver.ipc_get_mem_handle)(&mut handle, address) }, "cuIpcGetMemHandle")?;
        drop(entered);
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Opens memory of another process. `Unsupported` where the driver refuses, as it does between GPUs without a way and
    /// across PID namespaces. Blocks; `Capturing` during a capture.
    pub fn import(self: &Arc<Self>, handle: &[u8; HANDLE_BYTES]) -> Result<Imported> {
        let changing = self.enter_to_change()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let (mut address, peer_access) = (0, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32);
        // SAFETY: writes one address; closed once, on drop.
        let status = unsafe { (self.driver.ipc_open_mem_handle)(&mut address, handle, peer_access) };
        let refused = |why: &str| {
            let found = format!("{} and a GPU of another process ({why})", self.device());
            Error::unsupported("device", found, "GPUs that reach each other's memory")
        };
        if status == ELSEWHERE {
            // The context is well: the process is of another PID namespace.
            return Err(refused("cuIpcOpenMemHandle gave CUDA_ERROR_INVALID_CONTEXT"));
        }
        self.check(status, "cuIpcOpenMemHandle")
            .map_err(|error| if error.kind() == ErrorKind::Cuda { refused(error.message()) } else { error })?;
        drop(changing);
        Ok(Imported { device: Arc::clone(self), address })
    }
}
