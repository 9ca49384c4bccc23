//! Host memory: aligned, zeroed, with an error instead of an abort where the system has none.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use super::numa::Node;
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// Alignment of every host buffer, bytes: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// From this size on a buffer is mapped by itself, at a multiple of a huge page, bytes.
const MAPPED: usize = 4 << 20;
/// A huge page, bytes.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed host memory at a multiple of 64 bytes; huge pages are advised from 4 MiB on. Dropping it frees the memory.
///
/// Any thread may use it. Whoever accesses the memory through the pointers keeps accesses from racing.
#[derive(Debug)]
pub struct HostBuffer {
    data: NonNull<u8>,
    bytes: usize,
    mapping: Option<(NonNull<libc::c_void>, usize)>,
}

// SAFETY: the memory has no tie to a thread, and no method accesses it by a shared reference: that takes a raw pointer and
// `unsafe`.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// `bytes` of zeroed memory (0 is allowed). `NoMemory` where the machine refuses.
    pub fn new(bytes: usize) -> Result<HostBuffer> {
        fault::point("host_buffer.new")?;
        if bytes >= MAPPED {
            return HostBuffer::map(bytes).ok_or_else(|| no_memory(bytes));
        }
        // An empty buffer holds one byte, so that its address is its own.
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| no_memory(bytes))?;
        // SAFETY: the layout's size is at least 1.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| no_memory(bytes))?;
        Ok(HostBuffer { data, bytes, mapping: None })
    }

    /// As [`HostBuffer::new`], with pages of `node` where the system has some there, whoever touches them first.
    pub(crate) fn on(node: Option<&Node>, bytes: usize) -> Result<HostBuffer> {
        let Some(node) = node else { return HostBuffer::new(bytes) };
        fault::point("host_buffer.new")?;
        let buffer = HostBuffer::map(bytes).ok_or_else(|| no_memory(bytes))?;
        if let Some((base, length)) = buffer.mapping {
            // SAFETY: the mapping that this buffer has made for itself.
            unsafe { node.bind_memory(base.as_ptr(), length) };
        }
        Ok(buffer)
    }

    fn map(bytes: usize) -> Option<HostBuffer> {
        let length = bytes.checked_add(HUGE_PAGE).filter(|&n| isize::try_from(n).is_ok())?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: without MAP_FIXED the kernel chooses addresses that are not in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        let base = NonNull::new(base).filter(|p| p.as_ptr() != libc::MAP_FAILED)?;
        let skip = base.addr().get().next_multiple_of(HUGE_PAGE) - base.addr().get();
        // SAFETY: skip < HUGE_PAGE and length = bytes + HUGE_PAGE, so that the pointer and `bytes` after it are inside the
        // mapping, which is not larger than isize::MAX.
        let data = unsafe { base.cast::<u8>().add(skip) };
        // SAFETY: `data` is at a page of the mapping just made, which has `bytes` from there on; the advice does not change what
        // the pages hold. Refused, it changes nothing.
        unsafe { libc::madvise(data.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        Some(HostBuffer { data, bytes, mapping: Some((base, length)) })
    }

    /// The address of the first byte; aligned, and not null even if the buffer is empty.
    pub fn as_ptr(&self) -> *const u8 {
        self.data.as_ptr()
    }

    /// The same, for writing.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.data.as_ptr()
    }

    /// The bytes, while nobody uses a pointer to them.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `data` begins `bytes` bytes that were zeroed when they were allocated and are this buffer's own; the
        // exclusive borrow of the buffer lasts as long as the slice, and whoever writes through a pointer keeps it from racing.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.bytes) }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Some((base, length)) = self.mapping {
            // SAFETY: `map` made the mapping with this length; `drop` runs once, and the pointers that were given out end with
            // the buffer.
            unsafe { libc::munmap(base.as_ptr(), length) };
        } else {
            // SAFETY: `new` allocated it with this very layout, which was valid there; `drop` runs once, and the pointers that
            // were given out end with the buffer.
            unsafe { dealloc(self.data.as_ptr(), Layout::from_size_align_unchecked(self.bytes.max(1), ALIGN)) };
        }
    }
}

fn no_memory(bytes: usize) -> Error {
    Error::new(ErrorKind::NoMemory, format!("host memory: {bytes} bytes wanted, the system has none to give"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_refused_when_too_large() {
        for bytes in [0, 1, 63, 4096, MAPPED - 1, MAPPED, MAPPED + 12345] {
            let mut buffer = HostBuffer::new(bytes).unwrap();
            assert_eq!((buffer.as_ptr() as usize % ALIGN, buffer.len()), (0, bytes));
            let all = buffer.bytes_mut();
            assert!(all.len() == bytes && all.iter().all(|&b| b == 0));
            all.fill(7);
        }
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(HostBuffer::new(bytes).unwrap_err().kind(), ErrorKind::NoMemory);
        }
    }
}
