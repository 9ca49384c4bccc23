//! What a device gave and must get back: memory and modules, freed together and in order.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cudarc::driver::sys;

use super::context::{Changing, CudaDevice};
use crate::device::behind;
use crate::error::{ErrorKind, Result};

/// How long giving back waits for the device unless somebody says otherwise.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// One thing to give back.
pub(super) enum Item {
    Memory(sys::CUdeviceptr),
    Host(*mut c_void),
    Module(sys::CUmodule),
}

// SAFETY: handles of the driver, which takes them from any thread.
unsafe impl Send for Item {}

/// Memory and modules of one device. Dropping gives them back in the order in which they came.
///
/// Freeing memory and unloading modules waits for the work that may use them, here at most the patience given: what a
/// device is not done with by then is freed when it is, by a thread that stays behind for it.
pub(crate) struct Holdings {
    device: Arc<CudaDevice>,
    items: Vec<Item>,
    patience: Duration,
}

// SAFETY: handles only; they are used through the driver and, for words, by atomics.
unsafe impl Sync for Holdings {}

impl Holdings {
    /// Nothing yet.
    pub fn new(device: &Arc<CudaDevice>, patience: Duration) -> Holdings {
        Holdings { device: Arc::clone(device), items: Vec::new(), patience }
    }

    /// Whose they are.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Zeroed device memory of `bytes` bytes, aligned to 256; gives its address. Blocks. `Capturing` during a capture,
    /// `NoDeviceMemory` where there is none.
    pub fn memory(&mut self, bytes: usize) -> Result<u64> {
        let changing = self.device.enter_to_change()?;
        let mut data = 0;
        // SAFETY: writes one address; freed once, on drop.
        self.device.check(unsafe { (self.device.driver.mem_alloc)(&mut data, bytes.max(1)) }, "cuMemAlloc")?;
        self.items.push(Item::Memory(data));
        // SAFETY: fills the allocation just made.
        changing.and_wait("cuMemsetD8Async", |driver, stream| unsafe {
            (driver.memset_d8_async)(data, 0, bytes, stream)
        })?;
        Ok(data)
    }

    /// `count` words of zero in host memory that the device can write. Valid until these holdings are dropped.
    pub fn words(&mut self, count: usize) -> Result<Words> {
        let changing = self.device.enter_to_change()?;
        let (mut host, mut address) = (std::ptr::null_mut(), 0);
        let mapped = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        let driver = self.device.driver;
        // SAFETY: writes one pointer; freed once, on drop.
        let status = unsafe { (driver.mem_host_alloc)(&mut host, count * size_of::<u64>(), mapped) };
        self.device.check(status, "cuMemHostAlloc")?;
        self.items.push(Item::Host(host));
        // SAFETY: the allocation just made, which nobody else has; then writes one address.
        let status = unsafe {
            std::ptr::write_bytes(host.cast::<u64>(), 0, count);
            (driver.mem_host_get_device_pointer)(&mut address, host, 0)
        };
        self.device.check(status, "cuMemHostGetDevicePointer")?;
        drop(changing);
        Ok(Words { host: host.cast(), address, count })
    }

    /// Takes a module over.
    pub(super) fn module(&mut self, module: sys::CUmodule) {
        self.items.push(Item::Module(module));
    }
}

impl Drop for Holdings {
    fn drop(&mut self) {
        self.device.give_back(std::mem::take(&mut self.items), self.patience);
    }
}

/// Memory that is there to be freed: that waits for all work of its GPU, as synchronising the context would, which breaks
/// captures of other threads.
pub(crate) struct Fence {
    holdings: Holdings,
    data: u64,
}

impl Fence {
    /// Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, patience: Duration) -> Result<Fence> {
        let mut holdings = Holdings::new(device, patience);
        let data = holdings.memory(1)?;
        Ok(Fence { holdings, data })
    }

    /// Whether [`Fence::pass`] would wait for the end of a capture first.
    pub fn is_shut(&self) -> bool {
        self.holdings.device.check_change().is_err()
    }

    /// Waits until everything that this process enqueued on the GPU is done; before that, for the end of captures that
    /// forbid it. For threads of the library. The error is that of a lost context.
    pub fn pass(mut self) -> Result<()> {
        self.holdings.items.clear();
        let device = &self.holdings.device;
        let changing = device.enter_between_captures()?;
        // SAFETY: allocated by `new`, and forgotten there just now.
        device.check_wait(unsafe { (device.driver.mem_free)(self.data) }, "cuMemFree")?;
        drop(changing);
        Ok(())
    }
}

/// Words in host memory that the device and the host write and read at any time, without a wait.
pub(crate) struct Words {
    host: *mut u64,
    address: u64,
    count: usize,
}

// SAFETY: plain memory, reached by atomics only.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Where the device writes word 0.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Where the host has them.
    pub(super) fn host(&self) -> *mut u64 {
        self.host
    }

    /// Word `index`.
    ///
    /// # Safety
    /// The holdings that gave the words are alive.
    pub unsafe fn load(&self, index: usize) -> u64 {
        assert!(index < self.count);
        // SAFETY: inside the allocation, aligned, and reached by atomics only.
        unsafe { AtomicU64::from_ptr(self.host.add(index)) }.load(Ordering::Acquire)
    }

    /// Sets word `index`, for the device to see, if it is 0.
    ///
    /// # Safety
    /// The holdings that gave the words are alive.
    pub unsafe fn raise(&self, index: usize, value: u64) {
        assert!(index < self.count);
        // SAFETY: inside the allocation, aligned, and reached by atomics only.
        let word = unsafe { AtomicU64::from_ptr(self.host.add(index)) };
        // One that is set says what was first.
        let _ = word.compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Sets bits of word `index`, for the device to see.
    ///
    /// # Safety
    /// The holdings that gave the words are alive.
    pub unsafe fn add(&self, index: usize, bits: u64) {
        assert!(index < self.count);
        // SAFETY: inside the allocation, aligned, and reached by atomics only.
        unsafe { AtomicU64::from_ptr(self.host.add(index)) }.fetch_or(bits, Ordering::AcqRel);
    }

    /// Word `index`, which becomes 0.
    ///
    /// # Safety
    /// The holdings that gave the words are alive.
    pub unsafe fn take(&self, index: usize) -> u64 {
        assert!(index < self.count);
        // SAFETY: inside the allocation, aligned, and reached by atomics only.
        let word = unsafe { AtomicU64::from_ptr(self.host.add(index)) };
        if word.load(Ordering::Acquire) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) }
    }
}

impl CudaDevice {
    /// Frees `items`, in order. During a capture they are kept for the next time, since the graph may be about to use
    /// them; a lost context took them along.
    pub(super) fn give_back(self: &Arc<Self>, items: Vec<Item>, patience: Duration) {
        if items.is_empty() {
            return;
        }
        match self.enter_to_change() {
            Ok(changing) => {
                drop(changing);
                self.keep(items);
                let device = Arc::clone(self);
                behind(patience, move || device.free_kept());
            }
            Err(error) if error.kind() == ErrorKind::Capturing => self.keep(items),
            Err(_) => {}
        }
    }

    fn keep(&self, items: Vec<Item>) {
        self.kept.lock().extend(items);
    }

    /// Frees what was kept, unless a capture forbids it.
    pub(super) fn free_kept(&self) {
        if let Ok(changing) = self.enter_to_change() {
            let items = std::mem::take(&mut *self.kept.lock());
            self.free(items, &changing);
        }
    }

    fn free(&self, items: Vec<Item>, _changing: &Changing<'_>) {
        for item in items {
            // SAFETY: each was made by this device and is freed once. A status could change nothing here.
            unsafe {
                match item {
                    Item::Memory(data) => (self.driver.mem_free)(data),
                    Item::Host(words) => (self.driver.mem_free_host)(words),
                    Item::Module(module) => (self.driver.module_unload)(module),
                };
            }
        }
    }
}
