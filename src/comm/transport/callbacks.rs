//! What the engine gives: its own way to exchange blobs.

use std::ffi::c_void;

/// Gathers `bytes` bytes from every rank into `recv` (world * bytes), in rank order. Returns 0 when done, else anything.
/// Gives up after `timeout_ns`, or as soon as `*abort` is not 0.
pub type AllgatherCallback = unsafe extern "C" fn(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    timeout_ns: i64,
    abort: *const i32,
) -> i32;

/// Sends `send_bytes` bytes to rank `to` and receives `recv_bytes` from rank `from` at once; otherwise as
/// [`AllgatherCallback`]. Where one of the sizes is 0 nothing goes that way, and that peer expects nothing.
pub type SendrecvCallback = unsafe extern "C" fn(
    ctx: *mut c_void,
    send: *const c_void,
    send_bytes: usize,
    to: i32,
    recv: *mut c_void,
    recv_bytes: usize,
    from: i32,
    timeout_ns: i64,
    abort: *const i32,
) -> i32;

/// The engine's own way to exchange small blobs in host memory.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// Passed to every callback.
    pub ctx: *mut c_void,
    /// The one that is needed.
    pub allgather: AllgatherCallback,
    /// What the algorithms `TREE` and `RING` need.
    pub sendrecv: Option<SendrecvCallback>,
    /// Whether callbacks may come from the threads of CPU streams, and not only from threads that call the library.
    pub stream_threads: bool,
}

// SAFETY: the pointer is only passed to the callbacks, whose maker promised (`Communicator::create_from_transport`) that
// they may be called from every thread that `stream_threads` allows.
unsafe impl Send for Transport {}
// SAFETY: as above; and the calls of a rank are serialised (`Bootstrap`, `Rounds`), so no two use `ctx` at once.
unsafe impl Sync for Transport {}
