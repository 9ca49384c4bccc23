//! Communicators.

use std::ffi::c_char;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::error::{ErrorKind, Result};
use crate::runtime::{Communicator, Device, Runtime};

/// Creates one communicator a device, all in this process: comms[r] is rank r. A device may appear several times.
///
/// @param n ranks, at least 1.
/// @param devices [n], rank by rank.
/// @param config NULL for defaults.
/// @param comms [n], receives the handles; all of them or, on error, none.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED; UNAVAILABLE; UNSUPPORTED (a CUDA device in this
/// version); NO_MEMORY; SYSTEM.
///
/// **Ownership**: the caller's, each until its treeattn_comm_destroy().
/// **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_create_local(
    runtime: *mut treeattn_runtime_t,
    n: i32,
    devices: *const treeattn_device_t,
    config: *const treeattn_comm_config_t,
    comms: *mut *mut treeattn_comm_t,
) -> treeattn_status_t {
    guard("treeattn_comm_create_local", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: as the caller vouches.
        let (codes, config) =
            unsafe { (convert::ranks("devices", devices, n)?, convert::read_or_default("config", config)?) };
        convert::output("comms", comms)?;
        let device = |(rank, &code)| Device::from_code(&format!("devices[{rank}]"), code);
        let devices: Vec<Device> = codes.iter().enumerate().map(device).collect::<Result<_>>()?;
        // SAFETY: its strings are terminated, as the caller vouches.
        let config = unsafe { convert::comm_config(&config) }?;
        let created = Communicator::create_local(&runtime, &devices, &config)?;
        // SAFETY: `comms` has `n` writable values, as the caller vouches.
        unsafe { insert_all(created, comms) }
    })
}

/// Puts all objects into the table, or none.
///
/// # Safety
/// `out` has room for all of them.
pub(super) unsafe fn insert_all<T: handle::Object>(objects: Vec<T>, out: *mut *mut T::C) -> Result<()> {
    let mut handles = Vec::with_capacity(objects.len());
    for object in objects {
        match handle::insert(object) {
            Ok(handle) => handles.push(handle),
            Err(error) => {
                for handle in handles {
                    handle::remove::<T>("handle", handle)?;
                }
                return Err(error);
            }
        }
    }
    // SAFETY: as the caller vouches.
    unsafe { std::ptr::copy_nonoverlapping(handles.as_ptr(), out, handles.len()) };
    Ok(())
}

/// This rank, 0 to world - 1.
///
/// @param rank receives it.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_rank(comm: *mut treeattn_comm_t, rank: *mut i32) -> treeattn_status_t {
    guard("treeattn_comm_rank", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        comm.check_open()?;
        convert::output("rank", rank)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *rank = comm.rank() };
        Ok(())
    })
}

/// The number of ranks.
///
/// @param world receives it.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_world(comm: *mut treeattn_comm_t, world: *mut i32) -> treeattn_status_t {
    guard("treeattn_comm_world", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        comm.check_open()?;
        convert::output("world", world)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *world = comm.world() };
        Ok(())
    })
}

/// Links, capacities and the algorithm table, as JSON.
///
/// @param buf receives the text, cut to cap and terminated; NULL with cap = 0 to ask for the size.
/// @param needed receives the bytes of the whole text with its terminator; may be NULL where buf is not.
/// @return OK, also where the text was cut; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_describe(
    comm: *mut treeattn_comm_t,
    buf: *mut c_char,
    cap: usize,
    needed: *mut usize,
) -> treeattn_status_t {
    guard("treeattn_comm_describe", || {
        let text = handle::get::<Communicator>("comm", comm)?.describe()?;
        // SAFETY: as the caller vouches.
        unsafe { convert::text(&text, buf, cap, needed) }
    })
}

/// The health of a communicator: whether it is broken and by whom, or which sequence of a step had bad data. Execution
/// errors of enqueued steps are found here. Reading takes a pending INVALID_DATA; a broken communicator stays broken.
///
/// @param status set status->struct_size first.
/// @return OK where the status could be read (look at status->code); INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any, at any time. Never blocks nor synchronises. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_status(
    comm: *mut treeattn_comm_t,
    status: *mut treeattn_comm_status_t,
) -> treeattn_status_t {
    guard("treeattn_comm_status", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        // SAFETY: as the caller vouches.
        unsafe { convert::check_output("status", status) }?;
        let found = comm.status()?;
        let value = treeattn_comm_status_t {
            struct_size: 0,
            code: found.error.as_ref().map_or(TREEATTN_OK, |error| treeattn_status_t(error.kind().code())),
            rank: found.rank,
            step: found.step,
            plan: found.plan,
            sequence: found.sequence,
            broken: i32::from(found.error.as_ref().is_some_and(|error| error.kind() != ErrorKind::InvalidData)),
            message: convert::fixed(found.error.as_ref().map_or("", |error| error.message())),
        };
        // SAFETY: checked above.
        unsafe { convert::write(status, &value) };
        Ok(())
    })
}

/// Ends every wait on this communicator at once, on all ranks; they return ABORTED from now on.
///
/// @return OK; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any, at any time. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_abort(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_abort", || handle::get::<Communicator>("comm", comm)?.abort())
}

/// Destroys a communicator. Local, never collective: peers that still wait for this rank get PEER_LOST; its plans return
/// PARENT_DESTROYED and can still be destroyed.
///
/// @param comm NULL is fine.
/// @return OK; BAD_HANDLE.
///
/// **Threads**: any. Does not wait for peers. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_destroy(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_destroy", || {
        if let Some(comm) = handle::remove::<Communicator>("comm", comm)? {
            comm.close();
        }
        Ok(())
    })
}
