//! Copies to and from device memory; checks of a caller's pointers against what the driver knows of them.

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys;

use super::context::CudaDevice;
use crate::error::{Error, Result};

impl CudaDevice {
    /// Copies `source` to device memory. Blocks; not ordered after the work of any stream.
    ///
    /// # Safety
    /// `to` is memory of this device, of that length, which lives until the call returns and which no work that is enqueued
    /// reads or writes meanwhile.
    pub unsafe fn upload(&self, to: u64, source: &[u8]) -> Result<()> {
        // SAFETY: the context is current; the caller keeps the target alive and unused, `source` is borrowed, and the copy is
        // over when `and_wait` returns.
        self.enter_to_change()?.and_wait("cuMemcpyHtoDAsync", |driver, stream| unsafe {
            (driver.memcpy_htod_async)(to, source.as_ptr().cast(), source.len(), stream)
        })
    }

    /// Copies device memory to `target`. Blocks; not ordered after the work of any stream.
    ///
    /// # Safety
    /// `from` is memory of this device, of that length, which lives until the call returns. Where work that is enqueued writes an
    /// aligned word of it meanwhile, the word arrives as it was before or after.
    pub unsafe fn download(&self, from: u64, target: &mut [u8]) -> Result<()> {
        // SAFETY: the context is current; the caller keeps the source alive, `target` is borrowed mutably, and the copy is over
        // when `and_wait` returns.
        self.enter_to_change()?.and_wait("cuMemcpyDtoHAsync", |driver, stream| unsafe {
            (driver.memcpy_dtoh_async)(target.as_mut_ptr().cast(), from, target.len(), stream)
        })
    }
}

/// Pointers of a plan that are remembered as good, a power of two.
const REMEMBERED: usize = 1024;

/// Refuses a caller's pointers to host memory and to other devices. A pointer that was good is remembered: a step of known
/// pointers does not ask the driver.
pub(crate) struct PointerCheck {
    good: Box<[AtomicUsize]>,
}

impl PointerCheck {
    /// Remembers no pointer yet.
    pub fn new() -> PointerCheck {
        PointerCheck { good: (0..REMEMBERED).map(|_| AtomicUsize::new(0)).collect() }
    }

    /// Checks that `pointer` (null: nothing to check) is memory of `device`, whose context is current. `name` is the argument's
    /// name in an error. `InvalidArgument` for other memory.
    pub fn check(&self, device: &CudaDevice, name: &str, pointer: *const c_void) -> Result<()> {
        let address = pointer as usize;
        if address == 0 {
            return Ok(());
        }
        let slot = &self.good[((address as u64 >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize];
        if slot.load(Ordering::Relaxed) == address {
            return Ok(());
        }
        device.check_pointer(name, pointer)?;
        slot.store(address, Ordering::Relaxed);
        Ok(())
    }
}

impl CudaDevice {
    /// As [`PointerCheck::check`], of a pointer that is not null, without a memory.
    pub fn check_pointer(&self, name: &str, pointer: *const c_void) -> Result<()> {
        use sys::CUpointer_attribute as Attribute;
        let (mut kind, mut ordinal, mut managed) = (0u32, -2i32, 0u32);
        let mut attributes = [
            Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
        ];
        let mut values: [*mut c_void; 3] =
            [(&raw mut kind).cast(), (&raw mut ordinal).cast(), (&raw mut managed).cast()];
        // SAFETY: three attributes, each written to a local of the size that cuda.h gives it; for a pointer that the driver
        // does not know it writes zeros. The memory behind `pointer` is not touched.
        let status = unsafe {
            (self.driver.pointer_get_attributes)(3, attributes.as_mut_ptr(), values.as_mut_ptr(), pointer as u64)
        };
        self.check(status, "cuPointerGetAttributes")?;
        let wanted = || format!("memory of {}", self.device());
        let host = sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST as u32;
        match kind {
            0 => Err(Error::invalid(name, format_args!("{pointer:p}, memory that the driver does not know"), wanted())),
            _ if managed != 0 => Ok(()),
            kind if kind == host => Err(Error::invalid(name, format_args!("{pointer:p}, host memory"), wanted())),
            _ if ordinal != self.device().ordinal => {
                Err(Error::invalid(name, format_args!("{pointer:p}, memory of cuda:{ordinal}"), wanted()))
            }
            _ => Ok(()),
        }
    }
}
