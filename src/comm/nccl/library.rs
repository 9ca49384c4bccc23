//! NCCL's shared library: its calls looked up by name, its results turned into errors.
//!
//! The types are our own. cudarc's come with functions that look for other file names than NCCL's, and that panic where a
//! symbol is missing. Here a missing symbol is an error, and a result a number, whatever the version.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::os::unix::Library as Handle;
use parking_lot::Mutex;

use super::find::{self, Found};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the name of a communicator to be, `ncclUniqueId`.
pub const UNIQUE_ID_BYTES: usize = 128;

/// The result of a call of NCCL (`ncclResult_t`).
pub(super) type Status = c_int;
/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;

/// The call is done.
pub(super) const SUCCESS: Status = 0;
/// The call goes on after its return; `ncclCommGetAsyncError` tells how it ends.
pub(super) const IN_PROGRESS: Status = 7;
/// `ncclUint8`.
pub(super) const UINT8: c_int = 1;
/// `ncclFloat32`.
pub(super) const FLOAT32: c_int = 7;

/// The oldest version that has every call and field used here, as `ncclGetVersion` gives it.
const OLDEST: c_int = 21801;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

/// `ncclConfig_t` of 2.18. It carries its size: later versions give defaults to the fields that they added.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Defaults, except that calls do not block.
    pub fn non_blocking() -> Config {
        /// `NCCL_CONFIG_UNDEF_INT`: NCCL chooses.
        const UNSET: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
        }
    }
}

macro_rules! calls {
    ($($name:ident: $symbol:literal ($($arg:ty),* $(,)?) -> $result:ty;)*) => {
        /// The calls of NCCL that the library makes.
        pub(super) struct Calls {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> $result,)*
        }

        impl Calls {
            /// Looks up every call; the error is the name of one that is missing.
            fn load(library: &Handle) -> std::result::Result<Calls, &'static str> {
                // SAFETY: each symbol is used with the signature that nccl.h gives it since 2.18; `Library` keeps the handle, so
                // that they stay loaded.
                unsafe {
                    Ok(Calls {
                        $($name: *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)?,)*
                    })
                }
            }
        }
    };
}

calls! {
    get_version: "ncclGetVersion"(*mut c_int) -> Status;
    get_unique_id: "ncclGetUniqueId"(*mut UniqueId) -> Status;
    comm_init_rank_config: "ncclCommInitRankConfig"(*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> Status;
    comm_split: "ncclCommSplit"(RawComm, c_int, c_int, *mut RawComm, *mut Config) -> Status;
    comm_finalize: "ncclCommFinalize"(RawComm) -> Status;
    comm_destroy: "ncclCommDestroy"(RawComm) -> Status;
    comm_abort: "ncclCommAbort"(RawComm) -> Status;
    comm_get_async_error: "ncclCommGetAsyncError"(RawComm, *mut Status) -> Status;
    comm_count: "ncclCommCount"(RawComm, *mut c_int) -> Status;
    comm_user_rank: "ncclCommUserRank"(RawComm, *mut c_int) -> Status;
    comm_cu_device: "ncclCommCuDevice"(RawComm, *mut c_int) -> Status;
    all_gather: "ncclAllGather"(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> Status;
    all_reduce: "ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Status;
    get_error_string: "ncclGetErrorString"(Status) -> *const c_char;
    get_last_error: "ncclGetLastError"(RawComm) -> *const c_char;
}

/// A loaded NCCL, of a version that serves.
pub(crate) struct Library {
    pub(super) calls: Calls,
    version: c_int,
    /// The path of its file, for messages.
    file: String,
    /// Never dropped: NCCL has threads and exit handlers of its own.
    _handle: Handle,
}

impl Library {
    /// NCCL at `path` or, without one, wherever it is found; a copy that is in the process comes first. `Unavailable` where
    /// there is none, with the paths that were tried, or where it is too old, with its version.
    pub fn load(path: Option<&str>) -> Result<&'static Library> {
        match path {
            Some(path) => keep(find::at(path)?),
            None => keep(find::anywhere()?),
        }
    }

    /// The NCCL that is in the process, for a communicator of its own making. `Unavailable` where there is none.
    pub fn loaded(path: Option<&str>) -> Result<&'static Library> {
        keep(find::in_process(path)?)
    }

    /// Its version, as people write it.
    pub fn version(&self) -> String {
        version_text(self.version)
    }

    /// The file that it was loaded from.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// A fresh name of a communicator to be.
    pub fn unique_id(&self) -> Result<[u8; UNIQUE_ID_BYTES]> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: the call writes one id, of this layout, to a local.
        let status = unsafe { (self.calls.get_unique_id)(&mut id) };
        self.check(status, "ncclGetUniqueId")?;
        Ok(id.0)
    }

    /// The error of a failed call, in NCCL's words.
    pub fn check(&self, status: Status, call: &str) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // The last error of all communicators is asked for: the one that failed may be gone.
        // SAFETY: both calls give null or a string that ends with a zero: the first a static one, the second one that NCCL
        // overwrites at its next error, at worst while it is copied, but never frees.
        let (meaning, detail) = unsafe {
            (text((self.calls.get_error_string)(status)), text((self.calls.get_last_error)(std::ptr::null_mut())))
        };
        let detail = if detail.is_empty() { detail } else { format!("; {detail}") };
        let message = format!("{call}: found {meaning} ({status}{detail}), wanted success; NCCL {}", self.version());
        Err(Error::new(ErrorKind::Nccl, message))
    }
}

/// A string of NCCL, on one line.
///
/// # Safety
/// `text` is null, or a string that ends with a zero and lives until this returns.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null; the caller promises the rest.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Puts a library that was found to use, for the life of the process. `Unavailable` where its version does not serve.
fn keep(found: Found) -> Result<&'static Library> {
    static IN_USE: Mutex<Vec<&'static Library>> = Mutex::new(Vec::new());
    let unfit = |what: String| {
        let message = format!(
            "NCCL: found {}, {what}, wanted NCCL {} or later; install a newer one (pip: nvidia-nccl-cu12 or \
             nvidia-nccl-cu13) or name it in nccl_path",
            found.origin,
            version_text(OLDEST)
        );
        Error::new(ErrorKind::Unavailable, message)
    };
    // SAFETY: the symbol is used with the signature that nccl.h gives it, while `found` keeps the library loaded.
    let ask = unsafe { found.handle.get::<unsafe extern "C" fn(*mut c_int) -> Status>(b"ncclGetVersion\0") };
    let ask = *ask.map_err(|_| unfit("which has no ncclGetVersion".into()))?;
    let mut in_use = IN_USE.lock();
    if let Some(&known) = in_use.iter().find(|known| known.calls.get_version as usize == ask as usize) {
        return Ok(known);
    }
    let file = find::file_of(ask as usize).unwrap_or_else(|| found.origin.clone());
    let mut version = 0;
    // SAFETY: the call writes one int to a local.
    let status = unsafe { ask(&mut version) };
    if status != SUCCESS || version < OLDEST {
        return Err(unfit(format!("{file}, version {}", version_text(version))));
    }
    let calls = Calls::load(&found.handle)
        .map_err(|symbol| unfit(format!("{file}, version {} without {symbol}", version_text(version))))?;
    let library: &'static Library = Box::leak(Box::new(Library { calls, version, file, _handle: found.handle }));
    in_use.push(library);
    Ok(library)
}

/// A version code as people write it. Up to 2.8 a code had four digits.
fn version_text(code: c_int) -> String {
    match code {
        0..10_000 => format!("{}.{}.{}", code / 1000, code / 100 % 10, code % 100),
        _ => format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(
            (version_text(2803), version_text(21801), version_text(23203)),
            ("2.8.3".into(), "2.18.1".into(), "2.32.3".into())
        );
        assert_eq!(size_of::<Config>(), 48);
    }

    #[test]
    fn a_path_to_no_library_is_unavailable_and_named() {
        let error = Library::load(Some("/nowhere/libnccl.so.2")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().contains("/nowhere/libnccl.so.2"), "{error}");
        // A library, but another one.
        let error = Library::load(Some("libc.so.6")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().contains("no ncclGetVersion"), "{error}");
        let error = Library::loaded(Some("/nowhere/libnccl.so.2")).err().unwrap();
        assert!(error.message().contains("not loaded in this process"), "{error}");
    }
}
