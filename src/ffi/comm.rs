//! Communicators.

use std::ffi::c_char;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::error::{ErrorKind, Result};
use crate::runtime::{Communicator, Device, Runtime};

/// Creates a communicator whose ranks all live in this process, and gives every rank's end of it.
///
/// GPUs reach each other's memory and show it here by an exchange; where they cannot, the plans that would need it are
/// UNSUPPORTED and say why. Their steps are kernels that wait for each other on the device: one thread may drive all ranks,
/// step k on all before step k + 1 on any. Ranks that share a GPU divide its multiprocessors; then
/// CUDA_DEVICE_MAX_CONNECTIONS=32 keeps their streams apart.
///
/// @param runtime the runtime.
/// @param n       number of ranks, 1 to 1,024; of GPUs that exchange at most 64.
/// @param devices each rank's device; a device may appear several times. CPUs and GPUs do not mix.
/// @param config  NULL for defaults.
/// @param comms   where the n handles go, rank by rank.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be
///         had). On an error no communicator is left.
///
/// Ownership: the caller destroys each of the n. Thread safety: any thread. Does not block, but on GPUs while they show
/// that they reach each other, at most 5 s. Not capture-safe.
/// Since 0.1.
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
        // SAFETY: its strings are terminated and it has n groups, as the caller vouches.
        let config = unsafe { convert::comm_config(&config, Some(n)) }?;
        let created = Communicator::create_local(&runtime, &devices, &config)?;
        // SAFETY: `comms` has `n` writable values, as the caller vouches.
        unsafe { insert_all(created, comms) }
    })
}

/// Creates this rank's end of a communicator whose ranks the engine connects: other processes, other machines.
///
/// Collective: every rank calls it, in its own process or on a thread of its own, with the same world and config.
///
/// @param runtime   the runtime.
/// @param callbacks the engine's allgather and, if it has one, its sendrecv; set up with TREEATTN_TRANSPORT_INIT. The
///                  struct is read during the call; what `ctx` points to outlives the communicator and its plans.
/// @param world     number of ranks, 1 to 4,096.
/// @param rank      this rank, 0 to world - 1: its place in what the allgather gathers.
/// @param device    this rank's device; a CPU device in this version.
/// @param config    NULL for defaults. `threads_per_rank` = 0 is the cores of the machine over its ranks.
/// @param comm      where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; MISMATCH: the allgather brings other
///         ranks, or another world, than the arguments say; DESYNC: a rank uses another version of the library;
///         TRANSPORT: a callback failed; TIMEOUT: it did not end before the setup deadline; NO_MEMORY; SYSTEM. An error
///         is of this rank; peers that still wait for it end by their deadlines.
///
/// Ownership: the caller destroys the communicator. Thread safety: any thread; callbacks run on this one. Blocks until
/// all ranks have come, at most the setup deadline and 1 s. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_create_from_transport(
    runtime: *mut treeattn_runtime_t,
    callbacks: *const treeattn_transport_t,
    world: i32,
    rank: i32,
    device: treeattn_device_t,
    config: *const treeattn_comm_config_t,
    comm: *mut *mut treeattn_comm_t,
) -> treeattn_status_t {
    guard("treeattn_comm_create_from_transport", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: as the caller vouches.
        let transport = convert::transport(&unsafe { convert::read("callbacks", callbacks) }?)?;
        let device = convert::device(device)?;
        // SAFETY: as the caller vouches.
        let config = unsafe { convert::read_or_default("config", config) }?;
        // SAFETY: its strings are terminated, as the caller vouches.
        let config = unsafe { convert::comm_config(&config, None) }?;
        convert::output("comm", comm)?;
        // SAFETY: the caller vouches for the callbacks and for what `ctx` points to.
        let created =
            unsafe { Communicator::create_from_transport(&runtime, transport, world, rank, device, &config) }?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *comm = handle::insert(created)? };
        Ok(())
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

/// Which rank a communicator is.
///
/// @param comm the communicator.
/// @param rank where the number goes, 0 to world - 1.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
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

/// How many ranks a communicator has.
///
/// @param comm  the communicator.
/// @param world where the number goes.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
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

/// Describes a communicator as JSON: ranks, links, capacities, the algorithm table.
///
/// As snprintf: the text is cut where cap is too small, and always ended where cap is not 0.
///
/// @param comm   the communicator.
/// @param buf    where the text goes; NULL with cap = 0 to ask for the size only.
/// @param cap    size of buf in bytes.
/// @param needed where the size of the whole text goes, its end included; NULL if not wanted.
/// @return TREEATTN_OK, also where the text was cut; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block. Since 0.1.
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

/// Tells the health of a communicator: whether it is broken and why, or which bad data a step met.
///
/// Reading takes a pending INVALID_DATA, so that the next call does not tell it again; a broken communicator stays
/// broken.
///
/// @param comm   the communicator.
/// @param status set up with TREEATTN_COMM_STATUS_INIT; filled.
/// @return TREEATTN_OK, whatever `status->code` is; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time, also while another waits in a step. Never blocks or synchronises; capture-safe.
/// Since 0.1.
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

/// Breaks a communicator: every wait on it ends at once, on all ranks, with ABORTED, and so does every later call. Over
/// an engine's transport it reaches this rank only, and ends its callback; the peers end by their deadlines.
///
/// @param comm the communicator.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED.
///
/// Thread safety: any thread, any time, also while another waits in a step. Does not block. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_abort(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_abort", || handle::get::<Communicator>("comm", comm)?.abort())
}

/// Leaves a communicator and destroys this rank's end. Peers that need this rank from now on get PEER_LOST (over an
/// engine's transport what the transport gives, or TIMEOUT); plans made from it return PARENT_DESTROYED and can still be
/// destroyed.
///
/// @param comm NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE.
///
/// Thread safety: any thread. A step of this rank that is under way ends with an error. Does not wait for the other
/// ranks. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_destroy(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_destroy", || {
        if let Some(comm) = handle::remove::<Communicator>("comm", comm)? {
            comm.close();
        }
        Ok(())
    })
}
