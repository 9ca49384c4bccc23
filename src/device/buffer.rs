//! Host memory: aligned, zeroed, and an error instead of an abort where there is none.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// Alignment of every host buffer, bytes: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// From here on a buffer is mapped by itself at a huge-page border, bytes.
const MAPPED: usize = 4 << 20;
/// A huge page, bytes.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed host memory at a multiple of 64 bytes; huge pages are advised from 4 MiB on.
///
/// Who reads and writes through the pointers keeps them from racing.
#[derive(Debug)]
pub struct HostBuffer {
    data: NonNull<u8>,
    bytes: usize,
    mapping: Option<(NonNull<libc::c_void>, usize)>,
}

// SAFETY: plain memory with no tie to a thread; access goes through raw pointers.
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
        // SAFETY: the layout's size is not zero.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| no_memory(bytes))?;
        Ok(HostBuffer { data, bytes, mapping: None })
    }

    fn map(bytes: usize) -> Option<HostBuffer> {
        let length = bytes.checked_add(HUGE_PAGE).filter(|&n| isize::try_from(n).is_ok())?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        let base = NonNull::new(base).filter(|p| p.as_ptr() != libc::MAP_FAILED)?;
        let skip = base.addr().get().next_multiple_of(HUGE_PAGE) - base.addr().get();
        // SAFETY: skip < HUGE_PAGE, so the pointer and `bytes` after it are inside the mapping.
        let data = unsafe { base.cast::<u8>().add(skip) };
        // SAFETY: advice on pages of our own mapping; a refusal changes nothing.
        unsafe { libc::madvise(data.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        Some(HostBuffer { data, bytes, mapping: Some((base, length)) })
    }

    /// The first byte; aligned and not null even if the buffer is empty.
    pub fn as_ptr(&self) -> *const u8 {
        self.data.as_ptr()
    }

    /// The first byte, for writing.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.data.as_ptr()
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
            // SAFETY: the mapping made in `map`, unmapped once.
            unsafe { libc::munmap(base.as_ptr(), length) };
        } else {
            // SAFETY: allocated in `new` with this very layout, which was valid there.
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
            let buffer = HostBuffer::new(bytes).unwrap();
            assert_eq!((buffer.as_ptr() as usize % ALIGN, buffer.len()), (0, bytes));
            // SAFETY: the buffer is this long and nobody else has it.
            let all = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr(), bytes) };
            assert!(all.iter().all(|&b| b == 0));
            all.fill(7);
        }
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(HostBuffer::new(bytes).unwrap_err().kind(), ErrorKind::NoMemory);
        }
    }
}
