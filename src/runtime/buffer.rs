//! Buffers: a convenience for callers that have no allocator at hand.

use std::ffi::c_void;

use super::context::Runtime;
use crate::device::{Device, HostBuffer};
use crate::error::{Error, Result};

/// Zeroed memory of a device, 64-byte aligned, freed on drop. Uploads and downloads may come from any thread.
pub struct Buffer {
    runtime: Runtime,
    memory: HostBuffer,
}

impl Buffer {
    /// Allocates `bytes` bytes on `device`.
    pub fn alloc(runtime: &Runtime, device: Device, bytes: usize) -> Result<Buffer> {
        runtime.check_device(device)?;
        if bytes == 0 {
            return Err(Error::invalid("bytes", 0, "at least 1"));
        }
        Ok(Buffer { runtime: runtime.clone(), memory: HostBuffer::new(bytes)? })
    }

    /// The address of the first byte, on the buffer's device.
    pub fn data(&self) -> *mut c_void {
        self.memory.as_mut_ptr().cast()
    }

    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Copies `source` to byte `offset`. Blocks.
    pub fn upload(&self, offset: usize, source: &[u8]) -> Result<()> {
        self.check_range(offset, source.len())?;
        // SAFETY: the range was checked against the allocation; who else uses the bytes meanwhile is the caller's affair,
        // as with every buffer of a step.
        unsafe { std::ptr::copy(source.as_ptr(), self.memory.as_mut_ptr().add(offset), source.len()) };
        Ok(())
    }

    /// Copies from byte `offset` to `target`. Blocks.
    pub fn download(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        self.check_range(offset, target.len())?;
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy(self.memory.as_ptr().add(offset), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    /// Whether the runtime that the buffer was made from is still there.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.runtime.check_open()
    }

    pub(crate) fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        self.check_open()?;
        if offset.checked_add(len).is_none_or(|end| end > self.bytes()) {
            let wanted = format!("offset + bytes of at most {}", self.bytes());
            return Err(Error::invalid("offset, bytes", format!("{offset} and {len}"), wanted));
        }
        Ok(())
    }
}
