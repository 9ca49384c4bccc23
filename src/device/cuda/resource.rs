//! Things that the driver gave and must get back, as plain handles.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::Driver;

/// One allocation or module of a context. Its owner releases it once.
pub(super) enum Resource {
    /// Device memory of `cuMemAlloc`.
    DeviceMemory(sys::CUdeviceptr),
    /// Page-locked host memory of `cuMemHostAlloc`.
    HostMemory(*mut c_void),
    /// A module of `cuModuleLoadData`.
    Module(sys::CUmodule),
}

// SAFETY: a handle is a number to the driver, which takes it from any thread; nothing here reads through it.
unsafe impl Send for Resource {}

impl Resource {
    /// Gives it back. Waits for the work of its GPU that may use it.
    ///
    /// # Safety
    /// The context that made it is current, and nothing uses it from now on.
    pub unsafe fn release(self, driver: &Driver) {
        // SAFETY: made by the call that each pairs with, released once since `self` is consumed; the caller made the
        // context current. A failed release leaves nothing to do, so that the status is not looked at.
        unsafe {
            match self {
                Resource::DeviceMemory(data) => (driver.mem_free)(data),
                Resource::HostMemory(data) => (driver.mem_free_host)(data),
                Resource::Module(module) => (driver.module_unload)(module),
            };
        }
    }
}

/// A module of the image on a device, with the number of its users.
pub(super) struct LoadedModule {
    /// The name of its source.
    pub name: &'static str,
    pub handle: sys::CUmodule,
    pub users: usize,
}

// SAFETY: the handle is a number to the driver, which takes it from any thread.
unsafe impl Send for LoadedModule {}
