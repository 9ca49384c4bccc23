//! Runtimes, devices, logging, streams and buffers.

use std::ffi::{CString, c_void};

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, Output, OutputStruct};
use super::types::*;
use crate::error::Error;
use crate::runtime::{Buffer, DeviceKind, LogCallback, Runtime, RuntimeConfig, Stream};

/// Creates a runtime: what a process sets up once, before anything else.
///
/// @param config  NULL for defaults. Read during the call only.
/// @param runtime where the handle goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT (a word that names no instruction set); UNAVAILABLE (an instruction set that
///         this machine lacks); NO_MEMORY.
///
/// Ownership: the caller destroys the runtime. It may be destroyed before the objects made from it.
/// Thread safety: any thread; the runtime may be used by all threads at once. Does not block. Since 0.1.
///
/// # Safety
/// `config` is null or as long as its `struct_size` says, and its string is null or ends with a zero byte; `runtime` is
/// null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_create(
    config: *const treeattn_runtime_config_t,
    runtime: *mut *mut treeattn_runtime_t,
) -> treeattn_status_t {
    guard("treeattn_runtime_create", || {
        // SAFETY: `config` is null or as long as it says, by this function's contract.
        let config = unsafe { memory::read_or_default("config", config) }?;
        // SAFETY: `runtime` is null or writable until this call returns, by this function's contract.
        let runtime = unsafe { Output::new("runtime", runtime) }?;
        // SAFETY: the string is null or ended, by this function's contract.
        let cpu_isa = unsafe { memory::string("cpu_isa", config.cpu_isa) }?;
        runtime.set(handle::insert(Runtime::new(RuntimeConfig { cpu_isa })?)?);
        Ok(())
    })
}

/// Destroys a runtime. Objects made from it return PARENT_DESTROYED from now on, but for what ends or awaits steps that are
/// under way: `treeattn_stream_synchronize`, `treeattn_comm_abort`, `treeattn_comm_status` and the destruction of each.
///
/// The log callback is not called any more when this returns.
///
/// @param runtime NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE.
///
/// Thread safety: any thread. Waits for a log call that is under way. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_runtime_destroy(runtime: *mut treeattn_runtime_t) -> treeattn_status_t {
    guard("treeattn_runtime_destroy", || {
        if let Some(runtime) = handle::remove::<Runtime>("runtime", runtime)? {
            // What lives on must not call the engine back: `user_data` may go after this.
            runtime.set_log_callback(None)?;
            runtime.close();
        }
        Ok(())
    })
}

/// How many devices of a kind this build can use on this machine.
///
/// @param runtime the runtime.
/// @param kind    TREEATTN_DEVICE_CPU (one device, and where there are several NUMA nodes one more for each) or
///                TREEATTN_DEVICE_CUDA (0 without a driver).
/// @param count   where the number goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT.
///
/// Thread safety: any thread. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `count` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_device_count(
    runtime: *mut treeattn_runtime_t,
    kind: treeattn_device_kind_t,
    count: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_runtime_device_count", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        let kind = DeviceKind::from_code("kind", kind.0)?;
        // SAFETY: `count` is null or writable until this call returns, by this function's contract.
        let count = unsafe { Output::new("count", count) }?;
        count.set(runtime.device_count(kind)?);
        Ok(())
    })
}

/// Tells what a device is.
///
/// @param runtime the runtime.
/// @param device  TREEATTN_CPU(0), TREEATTN_CPU_NODE(n), TREEATTN_CUDA(n).
/// @param info    set up with TREEATTN_DEVICE_INFO_INIT; filled.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE (no such GPU, or no driver; the message names what is
///         missing).
///
/// Thread safety: any thread. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `info` is null or writable for as many bytes as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_runtime_device_info(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    info: *mut treeattn_device_info_t,
) -> treeattn_status_t {
    guard("treeattn_runtime_device_info", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `info` is null or writable for its size until this call returns, by this function's contract.
        let info = unsafe { OutputStruct::new("info", info) }?;
        let found = runtime.device_info(convert::device(device)?)?;
        info.set(&treeattn_device_info_t {
            struct_size: 0,
            device,
            units: found.units,
            memory: found.memory,
            name: memory::fixed(&found.name),
            isa: memory::fixed(&found.isa),
        });
        Ok(())
    })
}

/// What a log callback is called with.
struct UserData(*mut c_void);
// SAFETY: the library only hands the value back to the callback, which takes it on any thread by the contract of
// `treeattn_runtime_set_log_callback`.
unsafe impl Send for UserData {}
// SAFETY: as for `Send`; the callback takes it on several threads at once.
unsafe impl Sync for UserData {}

/// Sets the receiver of log lines, or removes it.
///
/// The library logs which communicators and plans it made and what it chose for them (INFO), bad data and mismatches of steps
/// (WARNING) and, on CPUs, steps that failed, once for each rank of a communicator that broke (ERROR). It logs nothing on the
/// way of a step that goes well, and nowhere else: it touches no global logger and no stream of the process.
///
/// @param runtime   the runtime.
/// @param callback  NULL removes. Called from any thread, several at once; must not call the library, unwind or jump.
/// @param user_data passed to the callback.
/// @return TREEATTN_OK; BAD_HANDLE.
///
/// Ownership: user_data stays the caller's and has to live until another callback is set or the runtime is destroyed.
/// Thread safety: any thread. Waits until no call of the former callback is under way. Not capture-safe. Since 0.1.
///
/// # Safety
/// Until another callback is set or the runtime is destroyed, `callback` may be called with `user_data` from any thread,
/// several at once; it does not unwind.
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
                    // SAFETY: callback and `user_data` may be used from any thread until another callback is set, by this
                    // function's contract; setting one waits for this call.
                    unsafe { callback(treeattn_log_level_t(level as i32), message.as_ptr(), *user_data) };
                }
            })
        });
        runtime.set_log_callback(callback)
    })
}

/// Creates a stream: an in-order queue of steps on a device.
///
/// On the CPU it has a thread of its own, so that one thread of the engine can drive several ranks: enqueue the step on
/// every rank's stream, then synchronise them. It holds 1,024 steps; enqueueing into a full one waits. On a GPU it is a
/// CUDA stream that does not wait for the legacy default stream.
///
/// @param runtime the runtime.
/// @param device  the device.
/// @param stream  where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be had); CUDA,
///         CUDA_PRIOR, CUDA_FATAL; CAPTURING.
///
/// Ownership: the caller destroys the stream. Thread safety: any thread; a stream may be used by several threads.
/// Does not block. Not capture-safe. Since 0.1.
///
/// # Safety
/// `stream` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_stream_create(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    stream: *mut *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_stream_create", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `stream` is null or writable until this call returns, by this function's contract.
        let stream = unsafe { Output::new("stream", stream) }?;
        stream.set(handle::insert(Stream::new(&runtime, convert::device(device)?)?)?);
        Ok(())
    })
}

/// Makes a stream of a CUDA stream of the caller's, on which steps are then enqueued.
///
/// @param runtime     the runtime.
/// @param device      the CUDA device of the stream.
/// @param cuda_stream a cudaStream_t or CUstream of the device's primary context, which is that of the CUDA runtime API;
///                    NULL is the legacy default stream.
/// @param stream      where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT (no CUDA device; a stream of another context); UNAVAILABLE; CUDA,
///         CUDA_PRIOR, CUDA_FATAL.
///
/// Ownership: the caller destroys the stream; cuda_stream stays the caller's and has to live as long. Thread safety: any
/// thread. Does not block. Capture-safe: also while cuda_stream is captured. Since 0.1.
///
/// # Safety
/// `cuda_stream` is null or a live stream of the device, and outlives the stream that is made of it; `stream` is null or
/// writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_stream_wrap_cuda(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    cuda_stream: *mut c_void,
    stream: *mut *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_stream_wrap_cuda", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `stream` is null or writable until this call returns, by this function's contract.
        let stream = unsafe { Output::new("stream", stream) }?;
        // SAFETY: `cuda_stream` is a live stream of the device and outlives what wraps it, by this function's contract.
        let created = unsafe { Stream::wrap_cuda(&runtime, convert::device(device)?, cuda_stream)? };
        stream.set(handle::insert(created)?);
        Ok(())
    })
}

/// Waits until everything enqueued so far is done, also where the runtime is destroyed.
///
/// @param stream the stream.
/// @return TREEATTN_OK; BAD_HANDLE; or the first error of a step that was enqueued on this stream, of whichever rank and
///         plan, since the last call by any thread, whose message tells of those of other steps, and which are then
///         forgotten (a broken communicator stays broken, and its later calls say so). On
///         a GPU: CUDA, CUDA_FATAL; CAPTURING; why communicators are broken whose steps were enqueued here; what steps
///         found in their data comes from treeattn_comm_status().
///
/// Thread safety: any thread. Blocks; every step that it waits for has a deadline. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_stream_synchronize(stream: *mut treeattn_stream_t) -> treeattn_status_t {
    guard("treeattn_stream_synchronize", || handle::get::<Stream>("stream", stream)?.synchronize())
}

/// Destroys a stream when everything enqueued is done. A wrapped CUDA stream lives on.
///
/// @param stream NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE; CAPTURING, and the stream lives on.
///
/// Thread safety: any thread but the library's own. Blocks; every step that it waits for has a deadline. Not
/// capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_stream_destroy(stream: *mut treeattn_stream_t) -> treeattn_status_t {
    guard("treeattn_stream_destroy", || {
        // Another thread may be inside a call on it, and so be the one that drops it.
        handle::remove_if("stream", stream, Stream::check_destroy)
            .map(|stream| stream.iter().for_each(|it| it.finish()))
    })
}

/// Allocates zeroed memory of a device, aligned to 64 bytes. A convenience: every call takes raw pointers.
///
/// @param runtime the runtime.
/// @param device  the device.
/// @param bytes   how many, at least 1.
/// @param buffer  where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE; NO_MEMORY; NO_DEVICE_MEMORY; CUDA, CUDA_PRIOR,
///         CUDA_FATAL; CAPTURING.
///
/// Ownership: the caller destroys the buffer. Thread safety: any thread. May block on the device's allocator. Not
/// capture-safe. Since 0.1.
///
/// # Safety
/// `buffer` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_alloc(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    bytes: usize,
    buffer: *mut *mut treeattn_buffer_t,
) -> treeattn_status_t {
    guard("treeattn_buffer_alloc", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `buffer` is null or writable until this call returns, by this function's contract.
        let buffer = unsafe { Output::new("buffer", buffer) }?;
        buffer.set(handle::insert(Buffer::alloc(&runtime, convert::device(device)?, bytes)?)?);
        Ok(())
    })
}

/// The address of a buffer's first byte, on its device.
///
/// @param buffer the buffer.
/// @param data   where the address goes.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Ownership: the memory is the buffer's, valid until it is destroyed. Thread safety: any thread. Does not block;
/// capture-safe. Since 0.1.
///
/// # Safety
/// `data` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_data(
    buffer: *mut treeattn_buffer_t,
    data: *mut *mut c_void,
) -> treeattn_status_t {
    guard("treeattn_buffer_data", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        buffer.check_open()?;
        // SAFETY: `data` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("data", data) }?.set(buffer.data());
        Ok(())
    })
}

/// Copies host memory into a buffer.
///
/// @param buffer the buffer.
/// @param offset first byte in the buffer.
/// @param source host memory; NULL only with 0 bytes. May overlap the buffer.
/// @param bytes  how many; offset + bytes is at most the buffer's size.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT, with nothing copied; CUDA, CUDA_PRIOR,
///         CUDA_FATAL; CAPTURING.
///
/// Thread safety: any thread; who else uses the bytes meanwhile is the caller's affair. Blocks until copied. Not
/// capture-safe. Since 0.1.
///
/// # Safety
/// `source` is null or has `bytes` readable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_upload(
    buffer: *mut treeattn_buffer_t,
    offset: usize,
    source: *const c_void,
    bytes: usize,
) -> treeattn_status_t {
    guard("treeattn_buffer_upload", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        if source.is_null() && bytes > 0 {
            return Err(Error::invalid("source", "NULL", "a pointer"));
        }
        // SAFETY: `source` has `bytes` readable bytes, by this function's contract.
        unsafe { buffer.upload_from(offset, source.cast(), bytes) }
    })
}

/// Copies from a buffer to host memory.
///
/// @param buffer the buffer.
/// @param offset first byte in the buffer.
/// @param target host memory; NULL only with 0 bytes. May overlap the buffer.
/// @param bytes  how many; offset + bytes is at most the buffer's size.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT, with nothing copied; CUDA, CUDA_PRIOR,
///         CUDA_FATAL; CAPTURING.
///
/// Thread safety: any thread; work that still writes the bytes is not waited for: synchronise its stream first. Blocks
/// until copied. Not capture-safe. Since 0.1.
///
/// # Safety
/// `target` is null or has `bytes` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_buffer_download(
    buffer: *mut treeattn_buffer_t,
    offset: usize,
    target: *mut c_void,
    bytes: usize,
) -> treeattn_status_t {
    guard("treeattn_buffer_download", || {
        let buffer = handle::get::<Buffer>("buffer", buffer)?;
        if target.is_null() && bytes > 0 {
            return Err(Error::invalid("target", "NULL", "a pointer"));
        }
        // SAFETY: `target` has `bytes` writable bytes, by this function's contract.
        unsafe { buffer.download_to(offset, target.cast(), bytes) }
    })
}

/// Destroys a buffer and frees its memory. On the CPU enqueued work that uses it is not waited for; on a GPU it is, at
/// most 10 seconds (what is not done by then is freed when it is).
///
/// @param buffer NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE; CAPTURING, and the buffer lives on.
///
/// Thread safety: any thread. May block on the device's allocator. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_buffer_destroy(buffer: *mut treeattn_buffer_t) -> treeattn_status_t {
    guard("treeattn_buffer_destroy", || handle::remove_if("buffer", buffer, Buffer::check_destroy).map(drop))
}
