//! Buffers: a convenience for callers that have no allocator at hand.

use std::ffi::c_void;

use parking_lot::Mutex;

use super::context::Runtime;
use crate::device::{Device, HostBuffer};
use crate::error::{Error, Result};

/// Zeroed memory of a device, 64-byte aligned, freed on drop. Uploads and downloads may come from any thread.
pub struct Buffer {
    runtime: Runtime,
    memory: Mutex<HostBuffer>,
    data: usize,
    bytes: usize,
}

impl Buffer {
    /// Allocates `bytes` bytes on `device`.
    pub fn alloc(runtime: &Runtime, device: Device, bytes: usize) -> Result<Buffer> {
        runtime.check_device(device)?;
        if bytes == 0 {
            return Err(Error::invalid("bytes", 0, "at least 1"));
        }
        let mut memory = HostBuffer::new(bytes)?;
        let data = memory.as_mut_ptr() as usize;
        Ok(Buffer { runtime: runtime.clone(), memory: Mutex::new(memory), data, bytes })
    }

    /// The address of the first byte, on the buffer's device.
    pub fn data(&self) -> *mut c_void {
        self.data as *mut c_void
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `source` to byte `offset`. Blocks.
    pub fn upload(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.check_range(offset, source.len())?;
        let mut memory = self.memory.lock();
        // SAFETY: the range was checked against the allocation, which lives while `memory` is held; `source` is a
        // caller's slice, which cannot overlap a buffer only reachable by raw pointer without the caller's own unsafe.
        unsafe { std::ptr::copy(source.as_ptr(), memory.as_mut_ptr().add(offset), source.len()) };
        Ok(())
    }

    /// Copies from byte `offset` to `target`. Blocks.
    pub fn download(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.check_range(offset, target.len())?;
        let memory = self.memory.lock();
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy(memory.as_ptr().add(offset), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        self.runtime.check_open()?;
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            let wanted = format!("offset + bytes of at most {}", self.bytes);
            return Err(Error::invalid("offset, bytes", format!("{offset} and {len}"), wanted));
        }
        Ok(())
    }
}
