//! Version and error text.

use std::ffi::{CStr, c_char};

use super::codes::*;
use super::guard::{guard_value, last_error};
use crate::error::ErrorKind;

/// The library's version, "MAJOR.MINOR.PATCH". Compare with TREEATTN_VERSION_ of the header.
///
/// **Returns** a static string; never NULL.
/// **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    guard_value("treeattn_version", VERSION.as_ptr().cast(), || VERSION.as_ptr().cast())
}

/// The library's TREEATTN_ABI_VERSION. An engine works with a library whose number is the one it was compiled with.
///
/// **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_abi_version() -> i32 {
    guard_value("treeattn_abi_version", TREEATTN_ABI_VERSION, || TREEATTN_ABI_VERSION)
}

/// The name of a status code, such as "INVALID_ARGUMENT"; "UNKNOWN" for any other number.
///
/// **Returns** a static string; never NULL.
/// **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_status_string(status: treeattn_status_t) -> *const c_char {
    guard_value("treeattn_status_string", c"UNKNOWN".as_ptr(), || name(status).as_ptr())
}

fn name(status: treeattn_status_t) -> &'static CStr {
    match ErrorKind::from_code(status.0) {
        None if status == TREEATTN_OK => c"OK",
        None => c"UNKNOWN",
        Some(kind) => match kind {
            ErrorKind::InvalidArgument => c"INVALID_ARGUMENT",
            ErrorKind::BadHandle => c"BAD_HANDLE",
            ErrorKind::ParentDestroyed => c"PARENT_DESTROYED",
            ErrorKind::Unsupported => c"UNSUPPORTED",
            ErrorKind::Unavailable => c"UNAVAILABLE",
            ErrorKind::Mismatch => c"MISMATCH",
            ErrorKind::Desync => c"DESYNC",
            ErrorKind::Timeout => c"TIMEOUT",
            ErrorKind::PeerLost => c"PEER_LOST",
            ErrorKind::Aborted => c"ABORTED",
            ErrorKind::InvalidData => c"INVALID_DATA",
            ErrorKind::NoMemory => c"NO_MEMORY",
            ErrorKind::NoDeviceMemory => c"NO_DEVICE_MEMORY",
            ErrorKind::Capturing => c"CAPTURING",
            ErrorKind::Cuda => c"CUDA",
            ErrorKind::CudaFatal => c"CUDA_FATAL",
            ErrorKind::CudaPrior => c"CUDA_PRIOR",
            ErrorKind::Nccl => c"NCCL",
            ErrorKind::Transport => c"TRANSPORT",
            ErrorKind::System => c"SYSTEM",
            ErrorKind::Internal => c"INTERNAL",
            ErrorKind::Busy => c"BUSY",
        },
    }
}

/// What the last failed call on this thread found and wanted: the function, the argument, both values.
///
/// **Returns** a string of this thread, "" before its first failure; never NULL.
/// **Ownership**: the library's; valid until the next failed call on this thread, or the thread's end.
/// **Threads**: any; each has its own. Never blocks. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_last_error_message() -> *const c_char {
    guard_value("treeattn_last_error_message", c"".as_ptr(), last_error)
}

/// A part of a version as a number.
const fn number(text: &str) -> i32 {
    let (digits, mut at, mut value) = (text.as_bytes(), 0, 0);
    while at < digits.len() {
        value = value * 10 + (digits[at] - b'0') as i32;
        at += 1;
    }
    value
}

const _: () = assert!(
    TREEATTN_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR"))
        && TREEATTN_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR"))
        && TREEATTN_VERSION_PATCH == number(env!("CARGO_PKG_VERSION_PATCH")),
    "the header's version is not the crate's"
);
