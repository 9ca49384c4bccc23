//! Memory of a device, freed together and in order; words that device and host share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cudarc::driver::sys;

use super::context::CudaDevice;
use super::resource::Resource;
use crate::error::Result;

/// How long freeing keeps its caller, unless somebody says otherwise.
pub(crate) const FREE_TIMEOUT: Duration = Duration::from_secs(10);

/// Allocations of one device. Dropping frees them in the order in which they were made.
///
/// Freeing waits for the work that may use the memory. It keeps its caller at most for the timeout given here; the rest goes
/// on behind ([`CudaDevice::free`]).
pub(crate) struct Allocations {
    device: Arc<CudaDevice>,
    resources: Vec<Resource>,
    timeout: Duration,
}

// SAFETY: a shared reference reads nothing but the device: `resources` is touched through `&mut self` and on drop only.
unsafe impl Sync for Allocations {}

impl Allocations {
    /// None yet.
    pub fn new(device: &Arc<CudaDevice>, timeout: Duration) -> Allocations {
        Allocations { device: Arc::clone(device), resources: Vec::new(), timeout }
    }

    /// The device that they are on.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Zeroed device memory of `bytes` bytes, aligned to 256; gives its address. Blocks. `Capturing` during a capture,
    /// `NoDeviceMemory` where there is none.
    pub fn memory(&mut self, bytes: usize) -> Result<u64> {
        let changing = self.device.enter_to_change()?;
        let mut data = 0;
        // SAFETY: the context is current; the call writes one address to a local.
        self.device.check(unsafe { (self.device.driver.mem_alloc)(&mut data, bytes.max(1)) }, "cuMemAlloc")?;
        self.resources.push(Resource::DeviceMemory(data));
        // SAFETY: the fill covers the allocation just made, which nobody else knows yet, and is waited for.
        changing.and_wait("cuMemsetD8Async", |driver, stream| unsafe {
            (driver.memset_d8_async)(data, 0, bytes, stream)
        })?;
        Ok(data)
    }

    /// `count` words of zero in page-locked host memory that the device can write. Valid until `self` is dropped. Blocks.
    /// `Capturing` during a capture.
    pub fn words(&mut self, count: usize) -> Result<MappedWords> {
        let changing = self.device.enter_to_change()?;
        let (mut host, mut address) = (std::ptr::null_mut(), 0);
        let mapped = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        let driver = self.device.driver;
        // SAFETY: the context is current; the call writes one pointer to a local.
        let status = unsafe { (driver.mem_host_alloc)(&mut host, count * size_of::<u64>(), mapped) };
        self.device.check(status, "cuMemHostAlloc")?;
        self.resources.push(Resource::HostMemory(host));
        // SAFETY: the fill covers the allocation just made, page-aligned and known to nobody else; the call then writes one
        // address to a local.
        let status = unsafe {
            std::ptr::write_bytes(host.cast::<u64>(), 0, count);
            (driver.mem_host_get_device_pointer)(&mut address, host, 0)
        };
        self.device.check(status, "cuMemHostGetDevicePointer")?;
        drop(changing);
        Ok(MappedWords { host: host.cast(), address, count })
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        self.device.free(std::mem::take(&mut self.resources), self.timeout);
    }
}

/// Words in host memory that the device and the host write and read at any time, without waiting for each other.
pub(crate) struct MappedWords {
    host: *mut u64,
    address: u64,
    count: usize,
}

// SAFETY: the memory has no tie to a thread; every access after its making is atomic.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// The device's address of word 0.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The host's address of word 0.
    pub(super) fn host(&self) -> *mut u64 {
        self.host
    }

    /// Word `index`.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    unsafe fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count);
        // SAFETY: inside the allocation by the assertion, aligned since that is, and alive as the caller promises. The device
        // accesses it by whole 64-bit words, the host by atomics.
        unsafe { AtomicU64::from_ptr(self.host.add(index)) }
    }

    /// The value of word `index`.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    pub unsafe fn load(&self, index: usize) -> u64 {
        // SAFETY: the caller's promise is that of `word`.
        unsafe { self.word(index) }.load(Ordering::Acquire)
    }

    /// Sets word `index`, for the device to see, if it is 0: a word that is set tells what was first.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    pub unsafe fn raise(&self, index: usize, value: u64) {
        // SAFETY: the caller's promise is that of `word`.
        let _ = unsafe { self.word(index) }.compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Sets bits of word `index`, for the device to see.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    pub unsafe fn add(&self, index: usize, bits: u64) {
        // SAFETY: the caller's promise is that of `word`.
        unsafe { self.word(index) }.fetch_or(bits, Ordering::AcqRel);
    }

    /// The value of word `index`, which the device alone writes; 0 if the host has taken that value before. Word `taken`, which
    /// the host alone writes, holds the value that it took last.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    pub unsafe fn take_told(&self, index: usize, taken: usize) -> u64 {
        // SAFETY: the caller's promise is that of `word`.
        let (told, taken) = unsafe { (self.word(index), self.word(taken)) };
        let (before, now) = (taken.load(Ordering::Acquire), told.load(Ordering::Acquire));
        // Of several threads of the host only one may take the value.
        let is_mine = now != before && taken.compare_exchange(before, now, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if is_mine { now } else { 0 }
    }

    /// The value of word `index`, which becomes 0.
    ///
    /// # Safety
    /// The allocations that the words are part of have not been dropped.
    pub unsafe fn take(&self, index: usize) -> u64 {
        // SAFETY: the caller's promise is that of `word`.
        let word = unsafe { self.word(index) };
        if word.load(Ordering::Acquire) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) }
    }
}
