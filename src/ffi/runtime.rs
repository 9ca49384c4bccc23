//! Runtimes, devices, logging, streams and buffers.

use std::ffi::{CString, c_void};

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::error::{Error, Result};
use crate::runtime::{Buffer, DeviceKind, LogCallback, Runtime, RuntimeConfig, Stream};

/// Creates a runtime: a process's use of the library. Several may exist.
///
/// @param config NULL for defaults.
/// @param runtime receives the handle.
/// @return OK; INVALID_ARGUMENT; UNAVAILABLE where the machine lacks the instruction set asked for.
///
/// **Ownership**: the caller's, until treeattn_runtime_destroy().
/// **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_create(
    config: *const treeattn_runtime_config_t,
    runtime: *mut *mut treeattn_runtime_t,
) -> treeattn_status_t {
    guard("treeattn_runtime_create", || {
        // SAFETY: as the caller vouches.
        unsafe {
            let config = convert::read_or_default("config", config)?;
            convert::output("runtime", runtime)?;
            let cpu_isa = convert::string("cpu_isa", config.cpu_isa)?;
            *runtime = handle::insert(Runtime::new(RuntimeConfig { cpu_isa })?)?;
        }
        Ok(())
    })
}

/// Destroys a runtime. Objects made from it return PARENT_DESTROYED from now on and can still be destroyed.
///
/// @param runtime NULL is fine.
/// @return OK; BAD_HANDLE.
///
/// **Threads**: any. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_destroy(runtime: *mut treeattn_runtime_t) -> treeattn_status_t {
    guard("treeattn_runtime_destroy", || {
        if let Some(runtime) = handle::remove::<Runtime>("runtime", runtime)? {
            // What lives on must not call the engine back: `user_data` may go after this.
            runtime.set_log_callback(None)?;
            runtime.close();
        }
        Ok(())
    })
}

/// How many devices of a kind there are. Without a driver there are 0 CUDA devices.
///
/// @param count receives the number.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE.
///
/// **Threads**: any. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_device_count(
    runtime: *mut treeattn_runtime_t,
    kind: treeattn_device_kind_t,
    count: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_runtime_device_count", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        let kind = DeviceKind::from_code("kind", kind.0)?;
        convert::output("count", count)?;
        let found = runtime.device_count(kind)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *count = found };
        Ok(())
    })
}

/// What a device is.
///
/// @param info set info->struct_size first.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE where there is no such device, naming the driver library.
///
/// **Threads**: any. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_device_info(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    info: *mut treeattn_device_info_t,
) -> treeattn_status_t {
    guard("treeattn_runtime_device_info", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: as the caller vouches.
        unsafe { convert::check_output("info", info) }?;
        let found = runtime.device_info(convert::device(device)?)?;
        let value = treeattn_device_info_t {
            struct_size: 0,
            device,
            units: found.units,
            memory: found.memory,
            name: convert::fixed(&found.name),
            isa: convert::fixed(&found.isa),
        };
        // SAFETY: checked above.
        unsafe { convert::write(info, &value) };
        Ok(())
    })
}

struct UserData(*mut c_void);
// SAFETY: the engine says that its callback may be called from any thread with this value.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

/// Sets who receives log lines; NULL for nobody. The library writes no output of its own.
///
/// @param callback called from any thread, also during other calls; must not call the library nor unwind.
/// @param user_data passed on; must stay valid until the callback is replaced.
/// @return OK; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Blocks until calls of the former callback are over. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_set_log_callback(
    runtime: *mut treeattn_runtime_t,
    callback: treeattn_log_callback_t,
    user_data: *mut c_void,
) -> treeattn_status_t {
    guard("treeattn_runtime_set_log_callback", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        let user_data = UserData(user_data);
        let callback = callback.map(|callback| -> LogCallback {
            Box::new(move |level, message| {
                let UserData(user_data) = &user_data;
                if let Ok(message) = CString::new(message) {
                    // SAFETY: as the engine vouched when it set the callback.
                    unsafe { callback(treeattn_log_level_t(level as i32), message.as_ptr(), *user_data) };
                }
            })
        });
        runtime.set_log_callback(callback)
    })
}

/// Creates a stream: an in-order queue of steps on one device. On the CPU it has a thread of its own, and holds up to 1,024
/// steps before enqueueing waits for room.
///
/// @param stream receives the handle.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE; SYSTEM where no thread could be started.
///
/// **Ownership**: the caller's, until treeattn_stream_destroy().
/// **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_stream_create(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    stream: *mut *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_stream_create", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        convert::output("stream", stream)?;
        let created = Stream::new(&runtime, convert::device(device)?)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *stream = handle::insert(created)? };
        Ok(())
    })
}

/// Waits until everything enqueued so far is done, at most as long as its steps' deadlines allow.
///
/// @return OK, or the first error of a step since the last call, which is then forgotten: TIMEOUT, DESYNC, PEER_LOST,
/// ABORTED, INVALID_DATA, INTERNAL; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_stream_synchronize(stream: *mut treeattn_stream_t) -> treeattn_status_t {
    guard("treeattn_stream_synchronize", || handle::get::<Stream>("stream", stream)?.synchronize())
}

/// Destroys a stream when its enqueued steps are done (each is bounded by its deadline).
///
/// @param stream NULL is fine.
/// @return OK; BAD_HANDLE.
///
/// **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_stream_destroy(stream: *mut treeattn_stream_t) -> treeattn_status_t {
    guard("treeattn_stream_destroy", || handle::remove::<Stream>("stream", stream).map(drop))
}

/// Allocates zeroed memory on a device, aligned to 64 bytes. A convenience: every call takes raw pointers.
///
/// @param bytes at least 1.
/// @param buffer receives the handle.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE; NO_MEMORY.
///
/// **Ownership**: the caller's, until treeattn_buffer_destroy().
/// **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_alloc(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    bytes: usize,
    buffer: *mut *mut treeattn_buffer_t,
) -> treeattn_status_t {
    guard("treeattn_buffer_alloc", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        convert::output("buffer", buffer)?;
        let created = Buffer::alloc(&runtime, convert::device(device)?, bytes)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *buffer = handle::insert(created)? };
        Ok(())
    })
}

/// The address of a buffer's first byte, on its device.
///
/// @param data receives the address; valid until the buffer is destroyed.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_data(
    buffer: *mut treeattn_buffer_t,
    data: *mut *mut c_void,
) -> treeattn_status_t {
    guard("treeattn_buffer_data", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        buffer.check_open()?;
        convert::output("data", data)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *data = buffer.data() };
        Ok(())
    })
}

/// Copies host memory into a buffer, from byte `offset` on.
///
/// @return OK; INVALID_ARGUMENT where the range leaves the buffer; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_upload(
    buffer: *mut treeattn_buffer_t,
    offset: usize,
    source: *const c_void,
    bytes: usize,
) -> treeattn_status_t {
    guard("treeattn_buffer_upload", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        host_range("source", source, offset, bytes, &buffer)?;
        if bytes > 0 {
            // SAFETY: as the caller vouches.
            buffer.upload(offset, unsafe { std::slice::from_raw_parts(source.cast(), bytes) })?;
        }
        Ok(())
    })
}

/// Copies a buffer's bytes, from byte `offset` on, into host memory.
///
/// @return OK; INVALID_ARGUMENT where the range leaves the buffer; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_download(
    buffer: *mut treeattn_buffer_t,
    offset: usize,
    target: *mut c_void,
    bytes: usize,
) -> treeattn_status_t {
    guard("treeattn_buffer_download", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        host_range("target", target, offset, bytes, &buffer)?;
        if bytes > 0 {
            // SAFETY: as the caller vouches.
            buffer.download(offset, unsafe { std::slice::from_raw_parts_mut(target.cast(), bytes) })?;
        }
        Ok(())
    })
}

/// Destroys a buffer. No step may use it any more.
///
/// @param buffer NULL is fine.
/// @return OK; BAD_HANDLE.
///
/// **Threads**: any. Does not block. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_destroy(buffer: *mut treeattn_buffer_t) -> treeattn_status_t {
    guard("treeattn_buffer_destroy", || handle::remove::<Buffer>("buffer", buffer).map(drop))
}

/// Checks a copy before a slice is made of the caller's pointer.
fn host_range(name: &str, host: *const c_void, offset: usize, bytes: usize, buffer: &Buffer) -> Result<()> {
    if host.is_null() && bytes > 0 {
        return Err(Error::invalid(name, "NULL", "a pointer"));
    }
    buffer.check_range(offset, bytes)
}
