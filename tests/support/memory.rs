//! Buffers that end where they say: the page after (or before) them cannot be touched, and inputs can be made read-only.

use std::ffi::c_void;

/// A buffer of its own pages. Filled with 0xff at first, which is NaN in every float type and -1 in int32.
#[derive(Debug)]
pub struct Memory {
    map: *mut c_void,
    map_len: usize,
    data: *mut u8,
    len: usize,
}

// SAFETY: the pages belong to this object; whoever writes through pointers orders that with other use.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// A buffer of `len` bytes, a multiple of its elements' size. With `at_end` its last byte is the last one that can
    /// be touched, else its first byte is the first.
    pub fn new(len: usize, at_end: bool) -> Memory {
        // SAFETY: a fresh anonymous map; its two outer pages are closed, all between stays open.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let inner = len.max(1).next_multiple_of(page);
            let map_len = inner + 2 * page;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), map_len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "mmap of {map_len} bytes");
            let open = map.cast::<u8>().add(page);
            open.write_bytes(0xff, inner);
            assert_eq!(libc::mprotect(map, page, libc::PROT_NONE), 0);
            assert_eq!(libc::mprotect(open.add(inner).cast(), page, libc::PROT_NONE), 0);
            let data = if at_end { open.add(inner - len) } else { open };
            Memory { map, map_len, data, len }
        }
    }

    /// Numbers in memory of their own, read-only, ended by a closed page.
    pub fn of_ints(values: &[i32]) -> Memory {
        let mut memory = Memory::new(values.len() * 4, true);
        for (to, value) in memory.bytes_mut().chunks_exact_mut(4).zip(values) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        memory.freeze();
        memory
    }

    pub fn ptr(&self) -> *mut c_void {
        self.data.cast()
    }

    pub fn ints(&self) -> *const i32 {
        self.data.cast_const().cast()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer's own bytes.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; never called once frozen.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }

    /// Makes the buffer read-only: a write from now on ends the process.
    pub fn freeze(&mut self) {
        self.protect(libc::PROT_READ);
    }

    /// Makes it writable again.
    pub fn thaw(&mut self) {
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
    }

    fn protect(&mut self, how: i32) {
        // SAFETY: the pages between the two closed ones.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let open = self.map.cast::<u8>().add(page).cast();
            assert_eq!(libc::mprotect(open, self.map_len - 2 * page, how), 0);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the map of `new`.
        unsafe { libc::munmap(self.map, self.map_len) };
    }
}
