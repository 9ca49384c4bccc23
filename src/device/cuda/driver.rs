//! The CUDA driver library: found at run time, its calls looked up by name, its statuses turned into errors.
//!
//! The types are cudarc's. Its functions are not used: they panic where the library or a symbol is missing, and they return
//! an enum, which a status newer than the bindings would make undefined. Here a missing symbol is an error, and a status a
//! number.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::error::{Error, ErrorKind, Result};

/// The result of a call of the driver (`CUresult`); 0 is success.
pub(crate) type Status = u32;

/// The library's name in error messages.
const LIBRARY: &str = "libcuda.so.1";

macro_rules! driver {
    ($($name:ident: $symbol:literal ($($arg:ty),* $(,)?);)*) => {
        /// The calls of the driver that the library makes. All are thread-safe.
        pub(crate) struct Driver {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> Status,)*
        }

        impl Driver {
            /// Looks up every call; the error is the name of one that is missing.
            fn load() -> std::result::Result<Driver, &'static str> {
                // SAFETY: `culib` panics where there is no library, which the caller has ruled out. Each symbol is used with the
                // signature that cuda.h gives it, and the library is never unloaded.
                unsafe {
                    let library = sys::culib();
                    Ok(Driver {
                        $($name: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)?,)*
                    })
                }
            }
        }
    };
}

driver! {
    init: "cuInit"(c_uint);
    driver_get_version: "cuDriverGetVersion"(*mut c_int);
    get_error_name: "cuGetErrorName"(Status, *mut *const c_char);
    get_error_string: "cuGetErrorString"(Status, *mut *const c_char);
    device_get: "cuDeviceGet"(*mut sys::CUdevice, c_int);
    device_get_count: "cuDeviceGetCount"(*mut c_int);
    device_get_name: "cuDeviceGetName"(*mut c_char, c_int, sys::CUdevice);
    device_total_mem: "cuDeviceTotalMem_v2"(*mut usize, sys::CUdevice);
    device_get_attribute: "cuDeviceGetAttribute"(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    primary_ctx_retain: "cuDevicePrimaryCtxRetain"(*mut sys::CUcontext, sys::CUdevice);
    primary_ctx_release: "cuDevicePrimaryCtxRelease_v2"(sys::CUdevice);
    ctx_get_current: "cuCtxGetCurrent"(*mut sys::CUcontext);
    ctx_push_current: "cuCtxPushCurrent_v2"(sys::CUcontext);
    ctx_pop_current: "cuCtxPopCurrent_v2"(*mut sys::CUcontext);
    device_can_access_peer: "cuDeviceCanAccessPeer"(*mut c_int, sys::CUdevice, sys::CUdevice);
    ctx_enable_peer_access: "cuCtxEnablePeerAccess"(sys::CUcontext, c_uint);
    ipc_get_mem_handle: "cuIpcGetMemHandle"(*mut sys::CUipcMemHandle, sys::CUdeviceptr);
    ipc_open_mem_handle: "cuIpcOpenMemHandle_v2"(*mut sys::CUdeviceptr, sys::CUipcMemHandle, c_uint);
    ipc_close_mem_handle: "cuIpcCloseMemHandle"(sys::CUdeviceptr);
    thread_exchange_capture_mode: "cuThreadExchangeStreamCaptureMode"(*mut sys::CUstreamCaptureMode);
    mem_alloc: "cuMemAlloc_v2"(*mut sys::CUdeviceptr, usize);
    mem_free: "cuMemFree_v2"(sys::CUdeviceptr);
    mem_host_alloc: "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
    mem_free_host: "cuMemFreeHost"(*mut c_void);
    mem_host_get_device_pointer: "cuMemHostGetDevicePointer_v2"(*mut sys::CUdeviceptr, *mut c_void, c_uint);
    memset_d8_async: "cuMemsetD8Async"(sys::CUdeviceptr, u8, usize, sys::CUstream);
    memcpy_htod_async: "cuMemcpyHtoDAsync_v2"(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    memcpy_dtoh_async: "cuMemcpyDtoHAsync_v2"(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    pointer_get_attributes: "cuPointerGetAttributes"(
        c_uint,
        *mut sys::CUpointer_attribute,
        *mut *mut c_void,
        sys::CUdeviceptr,
    );
    stream_create: "cuStreamCreate"(*mut sys::CUstream, c_uint);
    stream_destroy: "cuStreamDestroy_v2"(sys::CUstream);
    stream_synchronize: "cuStreamSynchronize"(sys::CUstream);
    stream_query: "cuStreamQuery"(sys::CUstream);
    stream_is_capturing: "cuStreamIsCapturing"(sys::CUstream, *mut c_uint);
    stream_get_ctx: "cuStreamGetCtx"(sys::CUstream, *mut sys::CUcontext);
    module_load_data: "cuModuleLoadData"(*mut sys::CUmodule, *const c_void);
    module_unload: "cuModuleUnload"(sys::CUmodule);
    module_get_global: "cuModuleGetGlobal_v2"(*mut sys::CUdeviceptr, *mut usize, sys::CUmodule, *const c_char);
    module_get_function: "cuModuleGetFunction"(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    func_set_attribute: "cuFuncSetAttribute"(sys::CUfunction, sys::CUfunction_attribute, c_int);
    func_get_attribute: "cuFuncGetAttribute"(*mut c_int, sys::CUfunction_attribute, sys::CUfunction);
    occupancy: "cuOccupancyMaxActiveBlocksPerMultiprocessor"(*mut c_int, sys::CUfunction, c_int, usize);
    launch_kernel_ex: "cuLaunchKernelEx"(
        *const sys::CUlaunchConfig,
        sys::CUfunction,
        *mut *mut c_void,
        *mut *mut c_void,
    );
}

/// What a status says of the context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meaning {
    /// The call failed and nothing else.
    Call(ErrorKind),
    /// The context is lost: an asynchronous error, or somebody destroyed it.
    Context,
}

/// What `status` says of the context. It is not 0.
pub(super) fn meaning(status: Status) -> Meaning {
    match status {
        2 => Meaning::Call(ErrorKind::NoDeviceMemory),
        // The driver shut down, the context is unusable or destroyed, or a kernel or the hardware failed. The library's own
        // calls cannot cause one of these by their arguments.
        4 | 46 | 201 | 214 | 220 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999 => Meaning::Context,
        900..=908 => Meaning::Call(ErrorKind::Capturing),
        _ => Meaning::Call(ErrorKind::Cuda),
    }
}

/// The driver, initialised. `Unavailable`, with the library's name and what it said, where there is none.
pub(crate) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        // SAFETY: runs the initialisers of the system's own driver library, which every user of the GPU runs.
        if !unsafe { sys::is_culib_present() } {
            return Err(format!("{LIBRARY}: not found, so there are no CUDA devices; the NVIDIA driver brings it"));
        }
        let driver = Driver::load().map_err(|symbol| {
            format!("{LIBRARY}: found no {symbol}; a driver for CUDA 12.0 (525) or later is needed")
        })?;
        // SAFETY: the call takes a number, and comes before all others, as cuda.h asks.
        match unsafe { (driver.init)(0) } {
            0 => Ok(driver),
            status => Err(format!("{LIBRARY}: cuInit gave {}", driver.describe(status))),
        }
    });
    driver.as_ref().map_err(|message| Error::new(ErrorKind::Unavailable, message.clone()))
}

impl Driver {
    /// The version of CUDA that the driver was made for, as (major, minor).
    pub fn version(&self) -> (i32, i32) {
        let mut version = 0;
        // SAFETY: writes one int to a local.
        unsafe { (self.driver_get_version)(&mut version) };
        (version / 1000, version % 1000 / 10)
    }

    /// The name and meaning of a status.
    pub fn describe(&self, status: Status) -> String {
        let text = |get: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: the call writes one pointer to a local: null, or a string that is static in the library, which is never
            // unloaded.
            unsafe {
                (get(status, &mut text) == 0 && !text.is_null())
                    .then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        match (text(self.get_error_name), text(self.get_error_string)) {
            (Some(name), Some(meaning)) => format!("{name} ({status}: {meaning})"),
            _ => format!("error {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_sorted() {
        assert_eq!(meaning(2), Meaning::Call(ErrorKind::NoDeviceMemory));
        assert_eq!(meaning(1), Meaning::Call(ErrorKind::Cuda));
        assert_eq!(meaning(900), Meaning::Call(ErrorKind::Capturing));
        for lost in [700, 709, 719] {
            assert_eq!(meaning(lost), Meaning::Context);
        }
    }
}
