//! Buffers: a convenience for callers that have no allocator of their own.

use std::ffi::c_void;

use parking_lot::Mutex;

use super::context::Runtime;
use crate::device::cuda::{Allocations, CudaDevice, FREE_TIMEOUT};
use crate::device::{Device, DeviceKind, HostBuffer, node_of};
use crate::error::{Error, Result};

/// Zeroed memory of a device, 64-byte aligned, freed on drop. Uploads and downloads may come from any thread.
///
/// On a GPU, dropping waits for the work that may use the memory (at most 10 seconds; what is not done by then is freed
/// later), and `Capturing` is what allocating and copying return during a capture.
pub struct Buffer {
    runtime: Runtime,
    memory: Memory,
}

enum Memory {
    Cpu {
        memory: HostBuffer,
        /// Held while memory is copied, so that uploads and downloads of several threads do not race.
        copying: Mutex<()>,
    },
    Cuda {
        allocations: Allocations,
        address: u64,
        bytes: usize,
    },
}

impl Buffer {
    /// Allocates `bytes` bytes on `device`.
    pub fn alloc(runtime: &Runtime, device: Device, bytes: usize) -> Result<Buffer> {
        runtime.check_device(device)?;
        if bytes == 0 {
            return Err(Error::invalid("bytes", 0, "at least 1"));
        }
        let memory = match device.kind {
            DeviceKind::Cpu => {
                Memory::Cpu { memory: HostBuffer::on(node_of(device)?, bytes)?, copying: Mutex::new(()) }
            }
            DeviceKind::Cuda => {
                let mut allocations = Allocations::new(&CudaDevice::get(device)?, FREE_TIMEOUT);
                let address = allocations.memory(bytes)?;
                Memory::Cuda { allocations, address, bytes }
            }
        };
        Ok(Buffer { runtime: runtime.clone(), memory })
    }

    /// The address of the first byte, on the buffer's device.
    pub fn data(&self) -> *mut c_void {
        match &self.memory {
            Memory::Cpu { memory, .. } => memory.as_mut_ptr().cast(),
            Memory::Cuda { address, .. } => *address as *mut c_void,
        }
    }

    /// `Capturing` while a capture forbids destroying the buffer.
    pub fn check_destroy(&self) -> Result<()> {
        match &self.memory {
            Memory::Cpu { .. } => Ok(()),
            Memory::Cuda { allocations, .. } => allocations.device().check_change(),
        }
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Memory::Cpu { memory, .. } => memory.len(),
            Memory::Cuda { bytes, .. } => *bytes,
        }
    }

    /// Copies `source` to byte `offset`. Blocks. Not ordered after the work of streams: synchronise them first.
    pub fn upload(&self, offset: usize, source: &[u8]) -> Result<()> {
        // SAFETY: a slice is readable for its length.
        unsafe { self.upload_from(offset, source.as_ptr(), source.len()) }
    }

    /// As [`upload`](Self::upload), from memory that may overlap the buffer, and be null where `len` is 0.
    ///
    /// # Safety
    /// `source` has `len` readable bytes, where that is not 0.
    pub unsafe fn upload_from(&self, offset: usize, source: *const u8, len: usize) -> Result<()> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match &self.memory {
            Memory::Cpu { memory, copying } => {
                let _copying = copying.lock();
                // SAFETY: `offset + len` is within the allocation, as checked, and `source` has `len` bytes by this function's
                // contract; the two may overlap. Copies wait for each other, and steps that use the bytes meanwhile are
                // kept off by the contract of `Plan::decode`.
                unsafe { std::ptr::copy(source, memory.as_mut_ptr().add(offset), len) }
            }
            // SAFETY: the range is within the allocation, as checked. `source` has `len` bytes, and memory of a GPU does
            // not overlap them.
            Memory::Cuda { allocations, address, .. } => unsafe {
                allocations.device().upload(address + offset as u64, std::slice::from_raw_parts(source, len))?
            },
        }
        Ok(())
    }

    /// Copies from byte `offset` to `target`. Blocks. Not ordered after the work of streams: synchronise them first.
    pub fn download(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        // SAFETY: a slice is writable for its length.
        unsafe { self.download_to(offset, target.as_mut_ptr(), target.len()) }
    }

    /// As [`download`](Self::download), to memory that may overlap the buffer, and be null where `len` is 0.
    ///
    /// # Safety
    /// `target` has `len` writable bytes, where that is not 0.
    pub unsafe fn download_to(&self, offset: usize, target: *mut u8, len: usize) -> Result<()> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match &self.memory {
            Memory::Cpu { memory, copying } => {
                let _copying = copying.lock();
                // SAFETY: as in `upload_from`.
                unsafe { std::ptr::copy(memory.as_ptr().add(offset), target, len) }
            }
            // SAFETY: as in `upload_from`.
            Memory::Cuda { allocations, address, .. } => unsafe {
                allocations.device().download(address + offset as u64, std::slice::from_raw_parts_mut(target, len))?
            },
        }
        Ok(())
    }

    /// Whether the runtime that the buffer was made from is still there.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.runtime.check_open()
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        self.check_open()?;
        if offset.checked_add(len).is_none_or(|end| end > self.bytes()) {
            let wanted = format!("offset + bytes of at most {}", self.bytes());
            return Err(Error::invalid("offset, bytes", format!("{offset} and {len}"), wanted));
        }
        Ok(())
    }
}
