//! NCCL's shared library: its calls looked up by name, its results turned into errors.
//!
//! The types are our own. cudarc's come with functions that look for other file names than NCCL's own, and that panic
//! where a symbol is missing; here a missing symbol is an error, and a result a number, whatever the version.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::os::unix::Library as Handle;
use parking_lot::Mutex;

use super::find::{self, Found};
use crate::error::{Error, ErrorKind, Result};

/// What a call of NCCL returns.
pub(super) type Status = c_int;
/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;

/// The call is done.
pub(super) const SUCCESS: Status = 0;
/// The call goes on without its caller; `ncclCommGetAsyncError` tells how it ends.
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
pub(super) struct UniqueId(pub [u8; super::UNIQUE_ID_BYTES]);

/// `ncclConfig_t` of 2.18. It says how long it is, so that later versions fill in what they added.
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
    /// All defaults, but calls do not block.
    pub fn non_blocking() -> Config {
        /// What leaves a field to NCCL.
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
                // SAFETY: the signatures are those of nccl.h.
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
    /// The file, for messages.
    file: String,
    /// NCCL has threads and exit handlers of its own, so that it stays loaded.
    _handle: Handle,
}

impl Library {
    /// NCCL at `path` or, where there is none, wherever it is found; a copy that is in the process comes first.
    /// `Unavailable` where there is none, naming the places; where it is too old, naming it.
    pub fn load(path: Option<&str>) -> Result<&'static Library> {
        match path {
            Some(path) => keep(find::at(path)?),
            None => keep(find::anywhere()?),
        }
    }

    /// The NCCL that is in the process: only its own communicators mean anything to it.
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
    pub fn unique_id(&self) -> Result<[u8; super::UNIQUE_ID_BYTES]> {
        let mut id = UniqueId([0; super::UNIQUE_ID_BYTES]);
        // SAFETY: writes one id.
        let status = unsafe { (self.calls.get_unique_id)(&mut id) };
        self.check(status, "ncclGetUniqueId")?;
        Ok(id.0)
    }

    /// A failed call, with what NCCL says of it.
    pub fn check(&self, status: Status, call: &str) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: both give strings that live as long as NCCL (the latter until its next error), or null. The last error
        // of all communicators is asked for: one that failed may be gone.
        let (meaning, detail) = unsafe {
            (text((self.calls.get_error_string)(status)), text((self.calls.get_last_error)(std::ptr::null_mut())))
        };
        let detail = if detail.is_empty() { detail } else { format!("; {detail}") };
        let message = format!("{call}: found {meaning} ({status}{detail}), wanted success; NCCL {}", self.version());
        Err(Error::new(ErrorKind::Nccl, message))
    }
}

/// A string of NCCL, without the ends of its lines.
///
/// # Safety
/// `text` is null or a string.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller vouches.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Takes a library that was found into use, for as long as the process lives.
fn keep(found: Found) -> Result<&'static Library> {
    static KEPT: Mutex<Vec<&'static Library>> = Mutex::new(Vec::new());
    let unfit = |what: String| {
        let message = format!(
            "NCCL: found {}, {what}, wanted NCCL {} or later; install a newer one (pip: nvidia-nccl-cu12 or \
             nvidia-nccl-cu13) or name it in nccl_path",
            found.place,
            version_text(OLDEST)
        );
        Error::new(ErrorKind::Unavailable, message)
    };
    // SAFETY: the signature is that of nccl.h.
    let ask = unsafe { found.handle.get::<unsafe extern "C" fn(*mut c_int) -> Status>(b"ncclGetVersion\0") };
    let ask = *ask.map_err(|_| unfit("which has no ncclGetVersion".into()))?;
    let mut kept = KEPT.lock();
    if let Some(&known) = kept.iter().find(|known| known.calls.get_version as usize == ask as usize) {
        return Ok(known);
    }
    let file = find::file_of(ask as usize).unwrap_or_else(|| found.place.clone());
    let mut version = 0;
    // SAFETY: writes one int.
    let status = unsafe { ask(&mut version) };
    if status != SUCCESS || version < OLDEST {
        return Err(unfit(format!("{file}, version {}", version_text(version))));
    }
    let calls = Calls::load(&found.handle)
        .map_err(|symbol| unfit(format!("{file}, version {} without {symbol}", version_text(version))))?;
    let library: &'static Library = Box::leak(Box::new(Library { calls, version, file, _handle: found.handle }));
    kept.push(library);
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
