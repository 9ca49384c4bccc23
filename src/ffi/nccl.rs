//! Communicators over NCCL.

use std::ffi::c_void;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, Output};
use super::types::*;
use crate::runtime::{Communicator, NCCL_UNIQUE_ID_BYTES, Runtime};

/// Gives a fresh name for a communicator to be: one rank asks for it and brings its 128 bytes to all others in any way
/// (a file, a pipe, MPI), then every rank calls `treeattn_comm_create_nccl` with it. A name serves once.
///
/// NCCL is the one in this process, else libnccl.so.2, else the one that pip installed in $VIRTUAL_ENV or beside the python
/// of $PATH. Where it is elsewhere, the program loads it first: dlopen is enough.
///
/// @param runtime the runtime.
/// @param out     where the 128 bytes go: an `ncclUniqueId`.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT; UNAVAILABLE: there is no NCCL of version 2.18 or
///         later, the message says where it was looked for and what was found; NCCL: what NCCL says, for example that
///         there is no network interface to listen on.
///
/// NCCL listens in this process, on a socket and a thread of its own, until all ranks have come: the process stays until
/// then. Thread safety: any thread. Does not wait for other ranks; loads NCCL the first time. Not capture-safe. Since 0.1.
///
/// # Safety
/// `out` is null or has 128 writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_nccl_unique_id(runtime: *mut treeattn_runtime_t, out: *mut u8) -> treeattn_status_t {
    guard("treeattn_nccl_unique_id", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `out` is null or has 128 writable bytes until this call returns, by this function's contract.
        let out = unsafe { Output::new("out", out.cast::<[u8; NCCL_UNIQUE_ID_BYTES]>()) }?;
        out.set(Communicator::nccl_unique_id(&runtime)?);
        Ok(())
    })
}

/// Creates this rank's end of a communicator whose ranks NCCL connects: one GPU a rank, in processes or on threads of
/// their own, on one machine or several.
///
/// Collective: every rank calls it, with the same id, world and config, and its own rank and GPU.
///
/// @param runtime the runtime.
/// @param id      the 128 bytes that `treeattn_nccl_unique_id` gave one of the ranks.
/// @param world   number of ranks, 1 to 4,096.
/// @param rank    this rank, 0 to world - 1.
/// @param device  this rank's GPU.
/// @param config  NULL for defaults. `nccl_path` names the NCCL to load; `node_groups` and `executor` are NULL.
/// @param comm    where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT; UNSUPPORTED: not a GPU; UNAVAILABLE: no such
///         GPU, or no NCCL of version 2.18 or later; CAPTURING; TIMEOUT: a rank did not come before the setup deadline;
///         MISMATCH: the ranks run different versions of this library or of NCCL; NCCL: what NCCL says, for example that a
///         GPU is used twice; NO_MEMORY; NO_DEVICE_MEMORY; CUDA; CUDA_FATAL; CUDA_PRIOR; SYSTEM. An error is of this
///         rank; peers that still wait for it end by their deadlines.
///
/// Ownership: the caller destroys the communicator; the id may be freed at once. Thread safety: any thread; one thread
/// that makes several ranks would wait for itself, so that each needs one of its own. Blocks until all ranks have come, at
/// most the setup deadline and 1 s. Not capture-safe. Since 0.1.
///
/// # Safety
/// `id` is null or has 128 readable bytes; `config` is null or as long as its `struct_size` says, its string is null
/// or ends with a zero byte, and its executor is null or as long as it says; `comm` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_create_nccl(
    runtime: *mut treeattn_runtime_t,
    id: *const u8,
    world: i32,
    rank: i32,
    device: treeattn_device_t,
    config: *const treeattn_comm_config_t,
    comm: *mut *mut treeattn_comm_t,
) -> treeattn_status_t {
    guard("treeattn_comm_create_nccl", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `id` is null or has 128 readable bytes, by this function's contract.
        let id = unsafe { memory::value("id", id.cast::<[u8; NCCL_UNIQUE_ID_BYTES]>()) }?;
        let device = convert::device(device)?;
        // SAFETY: `config` is what `comm_config` wants, by this function's contract.
        let config = unsafe { convert::comm_config(config, None) }?;
        // SAFETY: `comm` is null or writable until this call returns, by this function's contract.
        let comm = unsafe { Output::new("comm", comm) }?;
        let created = Communicator::create_nccl(&runtime, &id, world, rank, device, &config)?;
        comm.set(handle::insert(created)?);
        Ok(())
    })
}

/// Creates this rank's end of a communicator with the ranks of an NCCL communicator that the engine has.
///
/// Collective: every rank of `nccl_comm` calls it, each on its own communicator, with the same config. A communicator of
/// the library's own is split off with ncclCommSplit; the given one is never used again by the library, and may go before
/// the result does.
///
/// @param runtime   the runtime.
/// @param nccl_comm the engine's `ncclComm_t`, of the NCCL that is loaded in this process (where there are several
///                  copies, `nccl_path` of the config says which). Nobody else uses it during the call.
/// @param device    the GPU of `nccl_comm`.
/// @param config    NULL for defaults; `node_groups` and `executor` are NULL.
/// @param comm      where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT: also where `nccl_comm` is of another device;
///         UNSUPPORTED: not a GPU; UNAVAILABLE: no such GPU, or no NCCL in this process, or one before 2.18; otherwise as
///         `treeattn_comm_create_nccl`. After TIMEOUT `nccl_comm` may still be in use by the split: abort it before it is
///         destroyed.
///
/// Ownership: the caller destroys the communicator, and keeps `nccl_comm`. Thread safety: any thread. Blocks until all
/// ranks have come, at most the setup deadline and 1 s. Not capture-safe. Since 0.1.
///
/// # Safety
/// `nccl_comm` is null or a live communicator of the NCCL that is loaded, which nobody uses during the call; `config` is
/// null or as long as its `struct_size` says, its string is null or ends with a zero byte, and its executor is null or
/// as long as it says; `comm` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_wrap_nccl(
    runtime: *mut treeattn_runtime_t,
    nccl_comm: *mut c_void,
    device: treeattn_device_t,
    config: *const treeattn_comm_config_t,
    comm: *mut *mut treeattn_comm_t,
) -> treeattn_status_t {
    guard("treeattn_comm_wrap_nccl", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        let device = convert::device(device)?;
        // SAFETY: `config` is what `comm_config` wants, by this function's contract.
        let config = unsafe { convert::comm_config(config, None) }?;
        // SAFETY: `comm` is null or writable until this call returns, by this function's contract.
        let comm = unsafe { Output::new("comm", comm) }?;
        // SAFETY: `nccl_comm` is null or a live communicator that nobody uses during this call, by this function's contract.
        let created = unsafe { Communicator::wrap_nccl(&runtime, nccl_comm, device, &config) }?;
        comm.set(handle::insert(created)?);
        Ok(())
    })
}
