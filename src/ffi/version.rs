//! Version and error text.

use std::ffi::{CStr, c_char};

use super::codes::*;
use super::guard::{guard_value, last_error};
use crate::error::ErrorKind;

/// The version of the library that is loaded, for example "0.2.0".
///
/// @return a text that is never freed; never NULL.
///
/// Ownership: the library's. Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    guard_value("treeattn_version", VERSION.as_ptr().cast(), || VERSION.as_ptr().cast())
}

/// The version of the binary interface of the library that is loaded.
///
/// A program made with a header whose TREEATTN_ABI_VERSION is higher than this uses calls or fields that the library
/// may not have.
///
/// @return the number, at least 1.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_abi_version() -> i32 {
    guard_value("treeattn_abi_version", TREEATTN_ABI_VERSION, || TREEATTN_ABI_VERSION)
}

/// The name of a status code, for example "TIMEOUT" for TREEATTN_ERROR_TIMEOUT.
///
/// @param status any value.
/// @return a text that is never freed; "UNKNOWN" for a value that is no code of this version; never NULL.
///
/// Ownership: the library's. Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
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
            ErrorKind::Executor => c"EXECUTOR",
        },
    }
}

/// Why the calling thread's last failing call failed: the call, the argument, the value found and the value wanted.
///
/// Calls that succeed leave it as it is. Errors of enqueued work are told by `treeattn_stream_synchronize` and
/// `treeattn_comm_status`.
///
/// @return a text, empty before the first failure; never NULL.
///
/// Ownership: the library's; valid until the next call of this thread that fails, or the thread's end. Thread safety:
/// any thread, any time; each sees its own. Does not block; capture-safe. Since 0.1.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_call_kinds_as_the_abi_does() {
        for kind in ErrorKind::ALL {
            assert_eq!(name(treeattn_status_t(kind.code())).to_str(), Ok(&*kind.name()));
        }
    }
}
