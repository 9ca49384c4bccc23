//! Communicators.

use std::ffi::c_char;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, Output, OutputRanks, OutputStruct, OutputText};
use super::types::*;
use crate::error::ErrorKind;
use crate::runtime::{Communicator, Runtime};

/// Creates a communicator whose ranks all live in this process, and gives every rank's end of it.
///
/// GPUs reach each other's memory and show it here by an exchange. Where they cannot, steps go over NCCL, which takes each GPU
/// once; `treeattn_comm_describe` says why (`no_windows`). Plans that need the memory (TWO_SHOT, CHECKED), and all where there
/// is no NCCL, are UNSUPPORTED. Steps are kernels that wait for each other on the device: one thread may drive all ranks,
/// step k on all before step k + 1 on any. Ranks that share a GPU divide its multiprocessors; then
/// CUDA_DEVICE_MAX_CONNECTIONS=32 keeps their streams apart.
///
/// @param runtime the runtime.
/// @param n       number of ranks, 1 to 1,024; of GPUs more than 64 exchange over NCCL.
/// @param devices each rank's device; a device may appear several times. CPUs and GPUs do not mix.
/// @param config  NULL for defaults.
/// @param comms   where the n handles go, rank by rank.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be
///         had). On an error no communicator is left.
///
/// Ownership: the caller destroys each of the n. Thread safety: any thread. Does not block, but on GPUs while they show
/// that they reach each other, at most 5 s. Not capture-safe.
/// Since 0.1.
///
/// # Safety
/// `devices` and `comms` are null or have `n` values, to be read and to be written. `config` is null or as long as its
/// `struct_size` says, its string is null or ends with a zero byte, its groups are null or `n`, and its executor is null or does
/// what `treeattn_executor_t` says.
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
        // SAFETY: `devices` is null or has `n` values that do not change during the call, by this function's contract.
        let codes = unsafe { memory::ranks("devices", devices, n) }?;
        // SAFETY: `comms` is null or has room for `n` handles, by this function's contract.
        let comms = unsafe { OutputRanks::new("comms", comms, n) }?;
        let devices = convert::devices(codes)?;
        // SAFETY: `config` is what `comm_config` wants, by this function's contract.
        let config = unsafe { convert::comm_config(config, Some(n)) }?;
        comms.set(&handle::insert_all(Communicator::create_local(&runtime, &devices, &config)?)?);
        Ok(())
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
/// @param rank      this rank, 0 to world - 1: its index in what the allgather gathers.
/// @param device    this rank's device: CPUs on all ranks, or CUDA devices on all. GPUs use the allgather to set up the
///                  communicator and its plans only; their steps go as those of treeattn_comm_create_nccl do.
/// @param config    NULL for defaults. `threads_per_rank` = 0 is the cores of the machine over its ranks.
/// @param comm      where the handle goes.
/// @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; MISMATCH: the allgather brings other
///         ranks, or another world, than the arguments say, or ranks are on devices of two kinds; DESYNC: a rank uses another version of the library;
///         TRANSPORT: a callback failed; TIMEOUT: it did not end before the setup deadline; NO_MEMORY; SYSTEM. An error
///         is of this rank; peers that still wait for it end by their deadlines.
///
/// Ownership: the caller destroys the communicator. Thread safety: any thread; callbacks run on this one. Blocks until
/// all ranks have come, at most the setup deadline and 1 s. Not capture-safe. Since 0.1.
///
/// # Safety
/// `callbacks` and `config` are null or as long as their `struct_size` says; the string of `config` is null or ends with
/// a zero byte, and its executor is null or does what `treeattn_executor_t` says; `comm` is null or writable. The callbacks do what `treeattn_transport_t` says, and what `ctx` points to
/// outlives the communicator, its plans and their steps.
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
        // SAFETY: `callbacks` is null or as long as it says, by this function's contract.
        let transport = convert::transport(&unsafe { memory::read("callbacks", callbacks) }?)?;
        let device = convert::device(device)?;
        // SAFETY: `config` is what `comm_config` wants, by this function's contract.
        let config = unsafe { convert::comm_config(config, None) }?;
        // SAFETY: `comm` is null or writable until this call returns, by this function's contract.
        let comm = unsafe { Output::new("comm", comm) }?;
        // SAFETY: the callbacks may be called as `treeattn_transport_t` says and `ctx` outlives the communicator, by this
        // function's contract.
        let created =
            unsafe { Communicator::create_from_transport(&runtime, transport, world, rank, device, &config) }?;
        comm.set(handle::insert(created)?);
        Ok(())
    })
}

/// Which rank a communicator is.
///
/// @param comm the communicator.
/// @param rank where the number goes, 0 to world - 1.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `rank` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_rank(comm: *mut treeattn_comm_t, rank: *mut i32) -> treeattn_status_t {
    guard("treeattn_comm_rank", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        comm.check_open()?;
        // SAFETY: `rank` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("rank", rank) }?.set(comm.rank());
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
///
/// # Safety
/// `world` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_world(comm: *mut treeattn_comm_t, world: *mut i32) -> treeattn_status_t {
    guard("treeattn_comm_world", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        comm.check_open()?;
        // SAFETY: `world` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("world", world) }?.set(comm.world());
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
///
/// # Safety
/// `buf` is null or has `cap` writable bytes; `needed` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_describe(
    comm: *mut treeattn_comm_t,
    buf: *mut c_char,
    cap: usize,
    needed: *mut usize,
) -> treeattn_status_t {
    guard("treeattn_comm_describe", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        // SAFETY: both are null or writable until this call returns, `buf` for `cap` bytes, by this function's contract.
        let out = unsafe { OutputText::new(buf, cap, needed) }?;
        out.set(&comm.describe()?);
        Ok(())
    })
}

/// Tells the health of a communicator: whether it is broken and why, or which bad data a step met.
///
/// Serves also where the runtime is destroyed. INVALID_DATA is told once: by the call with a NULL stream that met it; else
/// by this call or, of a step on a CPU stream, by `treeattn_stream_synchronize`, whichever comes first. A broken
/// communicator stays broken.
///
/// @param comm   the communicator.
/// @param status set up with TREEATTN_COMM_STATUS_INIT; filled.
/// @return TREEATTN_OK, whatever `status->code` is; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time, also while another waits in a step. Never blocks or synchronises; capture-safe.
/// Since 0.1.
///
/// # Safety
/// `status` is null or writable for as many bytes as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_comm_status(
    comm: *mut treeattn_comm_t,
    status: *mut treeattn_comm_status_t,
) -> treeattn_status_t {
    guard("treeattn_comm_status", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        // SAFETY: `status` is null or writable for its size until this call returns, by this function's contract.
        let status = unsafe { OutputStruct::new("status", status) }?;
        let found = comm.status()?;
        status.set(&treeattn_comm_status_t {
            struct_size: 0,
            code: found.error.as_ref().map_or(TREEATTN_OK, |error| treeattn_status_t(error.kind().code())),
            rank: found.rank,
            step: found.step,
            plan: found.plan,
            sequence: found.sequence,
            broken: i32::from(
                found
                    .error
                    .as_ref()
                    .is_some_and(|error| !matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::Mismatch)),
            ),
            message: memory::fixed(found.error.as_ref().map_or("", |error| error.message())),
        });
        Ok(())
    })
}

/// Breaks a communicator: every wait on it ends at once with ABORTED, on all ranks of a process and of GPUs that reach each
/// other's memory, and so does every later call. Over an engine's transport or NCCL it reaches this rank only, and ends its
/// callback; the peers end by their deadlines. Serves also where the runtime is destroyed.
///
/// @param comm the communicator.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED.
///
/// Thread safety: any thread, any time, also while another waits in a step. Does not block. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_comm_abort(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_abort", || handle::get::<Communicator>("comm", comm)?.abort())
}

/// Leaves a communicator and destroys this rank's end. Peers that need this rank from now on get PEER_LOST (over an
/// engine's transport what the transport gives, or TIMEOUT); plans made from it return PARENT_DESTROYED and can still be
/// destroyed.
///
/// @param comm NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE.
///
/// Thread safety: any thread. A step of this rank that is under way ends at once with PARENT_DESTROYED and NaN, and its
/// peers get PEER_LOST. Where all come before it has ended it is whole, on all ranks; between GPUs on those that have its part
/// already. Does not wait for the other ranks. Not capture-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_comm_destroy(comm: *mut treeattn_comm_t) -> treeattn_status_t {
    guard("treeattn_comm_destroy", || {
        if let Some(comm) = handle::remove::<Communicator>("comm", comm)? {
            comm.close();
            handle::drop_last(comm);
        }
        Ok(())
    })
}
