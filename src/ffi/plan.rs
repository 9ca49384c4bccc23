//! Plans: support queries, creation, steps, reports.

use std::sync::Arc;

use super::codes::*;
use super::comm::insert_all;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{self, Communicator, Plan, Runtime, Stream};

/// Whether a device serves a shape. Local: no communicator is needed.
///
/// @return OK where it does; UNSUPPORTED naming the field that it does not serve; INVALID_ARGUMENT naming the field that
/// makes no sense; BAD_HANDLE; UNAVAILABLE.
///
/// **Threads**: any. Does not block. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_attention_supported(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    desc: *const treeattn_attention_desc_t,
) -> treeattn_status_t {
    guard("treeattn_attention_supported", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: as the caller vouches.
        let desc = convert::attention_desc(&unsafe { convert::read("desc", desc) }?)?;
        runtime::attention_supported(&runtime, convert::device(device)?, &desc)
    })
}

/// Makes a shape ready on this rank: allocates everything that steps need. Collective: every rank of the communicator calls
/// it, local ranks from a thread each (or see treeattn_plan_create_all()).
///
/// @param plan receives the handle.
/// @return OK; MISMATCH on every rank where descriptors differ, naming field and ranks; TIMEOUT where a rank does not
/// come before the setup deadline; INVALID_ARGUMENT; UNSUPPORTED naming the field; BAD_HANDLE; PARENT_DESTROYED; NO_MEMORY;
/// what broke the communicator.
///
/// **Ownership**: the caller's, until treeattn_plan_destroy().
/// **Threads**: any, serialised with other calls on the communicator. Blocks until all ranks have come. Not during stream
/// capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_create(
    comm: *mut treeattn_comm_t,
    desc: *const treeattn_attention_desc_t,
    plan: *mut *mut treeattn_plan_t,
) -> treeattn_status_t {
    guard("treeattn_plan_create", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        // SAFETY: as the caller vouches.
        let desc = convert::attention_desc(&unsafe { convert::read("desc", desc) }?)?;
        convert::output("plan", plan)?;
        let created = Plan::create(&comm, &desc)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe { *plan = handle::insert(created)? };
        Ok(())
    })
}

/// treeattn_plan_create() for all ranks of a local group, from one thread.
///
/// @param n the group's ranks.
/// @param comms [n], every rank of one group, once; plans[i] belongs to comms[i].
/// @param plans [n], receives the handles; all of them or, on error, none.
/// @return as treeattn_plan_create(), without TIMEOUT.
///
/// **Ownership**: the caller's, each until its treeattn_plan_destroy().
/// **Threads**: any, serialised with other calls on the communicators. Blocks briefly. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_create_all(
    n: i32,
    comms: *const *mut treeattn_comm_t,
    desc: *const treeattn_attention_desc_t,
    plans: *mut *mut treeattn_plan_t,
) -> treeattn_status_t {
    guard("treeattn_plan_create_all", || {
        // SAFETY: as the caller vouches.
        let handles = unsafe { convert::ranks("comms", comms, n) }?;
        let comm = |(i, &comm)| handle::get::<Communicator>(&format!("comms[{i}]"), comm);
        let comms: Vec<_> = handles.iter().enumerate().map(comm).collect::<Result<_>>()?;
        // SAFETY: as the caller vouches.
        let desc = convert::attention_desc(&unsafe { convert::read("desc", desc) }?)?;
        convert::output("plans", plans)?;
        let created = Plan::create_all(&comms.iter().map(Arc::as_ref).collect::<Vec<_>>(), &desc)?;
        // SAFETY: `plans` has `n` writable values, as the caller vouches.
        unsafe { insert_all(created, plans) }
    })
}

/// A stream argument: NULL is none.
fn stream(handle: *mut treeattn_stream_t) -> Result<Option<Arc<Stream>>> {
    if handle.is_null() { Ok(None) } else { handle::get("stream", handle).map(Some) }
}

/// One decode step on this rank: attends the shard, exchanges the partials with the other ranks, writes the merged output.
/// Allocates nothing. All ranks issue the exchanging calls of a communicator in the same order.
///
/// @param stream enqueues there; NULL (CPU plans only) runs the step on the calling thread, so that every local rank then
/// needs a thread of its own.
/// @return enqueued: OK, INVALID_ARGUMENT, UNSUPPORTED, BAD_HANDLE, PARENT_DESTROYED, or what broke the communicator
/// before; nothing was written unless OK. What goes wrong in the step comes from treeattn_stream_synchronize() and
/// treeattn_comm_status(). With a NULL stream also: INVALID_DATA (outputs written, NaN for the sequence named), TIMEOUT,
/// DESYNC, PEER_LOST, ABORTED (outputs NaN).
///
/// **Ownership**: the caller's buffers stay valid and unchanged until the step is done; `args` itself is copied.
/// **Threads**: any, serialised with other calls on the communicator. Enqueues; blocks with a NULL stream, and where a CPU
/// stream already holds 1,024 steps. Capture-safe on CUDA streams. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_decode(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_decode_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_decode", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: as the caller vouches.
        let args = convert::decode_args(&unsafe { convert::read("args", args) }?)?;
        let stream = self::stream(stream)?;
        // SAFETY: the caller keeps the buffers valid until the step is done.
        unsafe { plan.decode(&args, stream.as_deref()) }
    })
}

/// This rank's partial alone: output and lse over its own shard, all heads, no exchange. Merge it with an own exchange, or
/// with treeattn_plan_merge() and treeattn_merge_partials().
///
/// @param args out is [token, q head, dim] and lse [token, q head], whatever the plan's output mode.
/// @return as treeattn_plan_decode().
///
/// **Ownership**, **Threads**: as treeattn_plan_decode(). **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_partial(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_decode_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_partial", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: as the caller vouches.
        let args = convert::decode_args(&unsafe { convert::read("args", args) }?)?;
        let stream = self::stream(stream)?;
        // SAFETY: the caller keeps the buffers valid until the step is done.
        unsafe { plan.partial(&args, stream.as_deref()) }
    })
}

/// Exchanges and merges partials that the engine made with a kernel of its own: every rank passes its own partial. Any plan
/// serves; one with kv_heads = 0 does nothing else.
///
/// @param args o is [token, head, dim], lse [token, head] in base e or 2.
/// @return as treeattn_plan_decode().
///
/// **Ownership**, **Threads**: as treeattn_plan_decode(). **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_merge(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_merge_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_merge", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: as the caller vouches.
        let args = convert::merge_args(&unsafe { convert::read("args", args) }?)?;
        let stream = self::stream(stream)?;
        // SAFETY: the caller keeps the buffers valid until the step is done.
        unsafe { plan.merge(&args, stream.as_deref()) }
    })
}

/// Memory that a plan holds; none of it depends on the length of the cache.
///
/// @param memory set memory->struct_size first.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_memory(
    plan: *mut treeattn_plan_t,
    memory: *mut treeattn_plan_memory_t,
) -> treeattn_status_t {
    guard("treeattn_plan_memory", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: as the caller vouches.
        unsafe { convert::check_output("memory", memory) }?;
        let found = plan.memory()?;
        let value = treeattn_plan_memory_t { struct_size: 0, workspace: found.workspace, window: found.window };
        // SAFETY: checked above.
        unsafe { convert::write(memory, &value) };
        Ok(())
    })
}

/// What a plan has done so far: steps, rounds, messages, bytes, the algorithm and why.
///
/// @param stats set stats->struct_size first.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_stats(
    plan: *mut treeattn_plan_t,
    stats: *mut treeattn_plan_stats_t,
) -> treeattn_status_t {
    guard("treeattn_plan_stats", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: as the caller vouches.
        unsafe { convert::check_output("stats", stats) }?;
        let found = plan.stats()?;
        let value = treeattn_plan_stats_t {
            struct_size: 0,
            plan: found.plan,
            steps: found.steps,
            rounds: found.rounds,
            messages: found.messages,
            bytes_sent: found.bytes_sent,
            peak_memory: found.peak_memory,
            algorithm: treeattn_algorithm_t(found.algorithm as i32),
            wire_dtype: treeattn_dtype_t(plan.desc().wire_dtype as i32),
            head_begin: plan.heads().start as i32,
            head_end: plan.heads().end as i32,
            reason: convert::fixed(&found.reason),
        };
        // SAFETY: checked above.
        unsafe { convert::write(stats, &value) };
        Ok(())
    })
}

/// Destroys a plan. Waits until its enqueued steps are done, at most the communicator's step deadline.
///
/// @param plan NULL is fine.
/// @return OK; BAD_HANDLE; TIMEOUT where steps were still enqueued (they run on and keep their memory; the handle is
/// dead all the same).
///
/// **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_destroy(plan: *mut treeattn_plan_t) -> treeattn_status_t {
    guard("treeattn_plan_destroy", || {
        let Some(plan) = handle::remove::<Plan>("plan", plan)? else {
            return Ok(());
        };
        if plan.wait(plan.deadline()) {
            return Ok(());
        }
        let message = format!("plan: found steps still enqueued after {:?}, wanted none", plan.deadline());
        Err(Error::new(ErrorKind::Timeout, message))
    })
}
