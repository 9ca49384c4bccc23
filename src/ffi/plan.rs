//! Plans: support queries, creation, steps, reports.

use std::sync::Arc;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, Output, OutputRanks, OutputStruct};
use super::types::*;
use crate::device::Deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{self, Communicator, Plan, Runtime, Stream};

/// Tells whether a device serves a shape. Local: asks no other rank, makes nothing.
///
/// @param runtime the runtime.
/// @param device  the device.
/// @param desc    the shape. Read during the call only.
/// @return TREEATTN_OK: a plan can be made; UNSUPPORTED: the message names the field; INVALID_ARGUMENT: the shape makes
///         no sense anywhere; BAD_HANDLE; UNAVAILABLE.
///
/// Thread safety: any thread. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `desc` is null or as long as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_attention_supported(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    desc: *const treeattn_attention_desc_t,
) -> treeattn_status_t {
    guard("treeattn_attention_supported", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `desc` is null or as long as it says, by this function's contract.
        let desc = convert::attention_desc(&unsafe { memory::read("desc", desc) }?)?;
        runtime::attention_supported(&runtime, convert::device(device)?, &desc)
    })
}

/// Creates a plan: everything that a shape needs on one rank, allocated once. Its memory does not depend on the length
/// of the cache, and one plan serves all layers of a shape.
///
/// Collective: every rank calls it, with the same descriptor, each from a thread or process of its own. Where one
/// thread holds all local ranks, see `treeattn_plan_create_all`.
///
/// @param comm this rank's end of the communicator.
/// @param desc the shape. Read during the call only.
/// @param plan where the handle goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field; MISMATCH: the ranks' descriptors differ, or one could
///         not make its plan; TIMEOUT: a rank did not come before the setup deadline; NO_MEMORY; BAD_HANDLE;
///         PARENT_DESTROYED; or what broke the communicator.
///
/// Ownership: the caller destroys the plan, before or after the communicator. Thread safety: calls on one communicator
/// are the caller's to serialise. Blocks until all ranks have come, at most the setup deadline. During a capture:
/// CAPTURING. Since 0.1.
///
/// # Safety
/// `desc` is null or as long as its `struct_size` says; `plan` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_create(
    comm: *mut treeattn_comm_t,
    desc: *const treeattn_attention_desc_t,
    plan: *mut *mut treeattn_plan_t,
) -> treeattn_status_t {
    guard("treeattn_plan_create", || {
        let comm = handle::get::<Communicator>("comm", comm)?;
        // SAFETY: `desc` is null or as long as it says, by this function's contract.
        let desc = convert::attention_desc(&unsafe { memory::read("desc", desc) }?)?;
        // SAFETY: `plan` is null or writable until this call returns, by this function's contract.
        let plan = unsafe { Output::new("plan", plan) }?;
        plan.set(handle::insert(Plan::create(&comm, &desc)?)?);
        Ok(())
    })
}

/// Creates the plans of all ranks of a local communicator from one thread.
///
/// @param n     number of ranks, all of the communicator.
/// @param comms every rank's end, each once.
/// @param desc  the shape. Read during the call only.
/// @param plans where the n handles go, in the order of comms.
/// @return as `treeattn_plan_create`. On an error no plan is left.
///
/// Ownership: the caller destroys each of the n. Thread safety: as `treeattn_plan_create`. Waits for no other call; between
/// GPUs, plans whose steps go over NCCL have it connect the ranks, on threads of the library, at most the setup deadline.
/// During a capture: CAPTURING. Since 0.1.
///
/// # Safety
/// `comms` and `plans` are null or have `n` values, to be read and to be written; `desc` is null or as long as its
/// `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_create_all(
    n: i32,
    comms: *const *mut treeattn_comm_t,
    desc: *const treeattn_attention_desc_t,
    plans: *mut *mut treeattn_plan_t,
) -> treeattn_status_t {
    guard("treeattn_plan_create_all", || {
        // SAFETY: `comms` is null or has `n` values that do not change during the call, by this function's contract.
        let handles = unsafe { memory::ranks("comms", comms, n) }?;
        let comm = |(i, &comm)| handle::get::<Communicator>(&format!("comms[{i}]"), comm);
        let comms: Vec<_> = handles.iter().enumerate().map(comm).collect::<Result<_>>()?;
        // SAFETY: `desc` is null or as long as it says, by this function's contract.
        let desc = convert::attention_desc(&unsafe { memory::read("desc", desc) }?)?;
        // SAFETY: `plans` is null or has room for `n` handles until this call returns, by this function's contract.
        let plans = unsafe { OutputRanks::new("plans", plans, n) }?;
        let created = Plan::create_all(&comms.iter().map(Arc::as_ref).collect::<Vec<_>>(), &desc)?;
        plans.set(&handle::insert_all(created)?);
        Ok(())
    })
}

/// One step: attends this rank's shard, exchanges the partials, and writes the exact output over all ranks' keys.
///
/// Collective: all ranks of the communicator issue the same steps in the same order, with the same `batch` and
/// `query_tokens`. A thread that drives several ranks enqueues a step on all of them before the next one on any.
/// Allocates nothing.
///
/// @param plan   the plan; in flight on one stream at a time.
/// @param args   the step. The struct is read during the call; what it points to has to stay valid, and unchanged by
///               others, until the step is done.
/// @param stream where to enqueue; of the plan's device. NULL on a CPU plan: the step runs on the calling thread, and each
///               local rank then needs a thread of its own. NULL on a CUDA plan is INVALID_ARGUMENT; the legacy default
///               stream is `treeattn_stream_wrap_cuda` of NULL. A CPU stream serves one rank of a communicator at a time:
///               INVALID_ARGUMENT while it holds a step of another one. A rank has steps on one CPU stream at a time: BUSY,
///               also with a NULL stream, while another one holds a step of it.
/// @return TREEATTN_OK; refused, with nothing enqueued or written, while the peers wait for this rank: INVALID_ARGUMENT or
///         UNSUPPORTED, by field; BAD_HANDLE; PARENT_DESTROYED; BUSY: another call of this rank that exchanges is under
///         way, or enqueued elsewhere. What broke the communicator (TIMEOUT, DESYNC, PEER_LOST, ABORTED, ...), with NaN in
///         all of the output; PARENT_DESTROYED, too, where the communicator is destroyed within the step. With a NULL stream
///         also INVALID_DATA and, of a CHECKED plan, MISMATCH: the output is written, with NaN in the sequence that the
///         message names, and in others that are bad. With a stream the errors of the step itself come from
///         `treeattn_stream_synchronize` or `treeattn_comm_status`.
///
/// Thread safety: calls on one communicator are the caller's to serialise. With a stream it enqueues (and waits only
/// for room in a full one or, on a broken communicator, for what is enqueued on a CPU stream; at most the step
/// deadline); with NULL it blocks, at most the step deadline. Capture-safe on CUDA streams. Since 0.1.
///
/// # Safety
/// `args` is null or as long as its `struct_size` says; what it points to is as `treeattn_decode_args_t` says, readable or
/// writable and used by nobody else, until the step is done. On a GPU, a plan is in flight on one stream at
/// a time, and so are the exchanging steps of a communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_decode(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_decode_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_decode", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `args` is null or as long as it says, by this function's contract.
        let args = convert::decode_args(&unsafe { memory::read("args", args) }?)?;
        let stream = handle::get_optional::<Stream>("stream", stream)?;
        // SAFETY: what `args` points to stays as it says until the step is done, and steps on a GPU are on one stream at a time, by
        // this function's contract.
        unsafe { plan.decode(&args, stream.as_deref()) }
    })
}

/// One step of a CPU plan on a team of the engine's threads: each of them calls this, with an index of its own, and all leave
/// with the same status. The library starts no thread. The bits are those of `treeattn_plan_decode` on as many threads.
///
/// Member 0 computes as the others do, and waits for the other ranks; `args` counts with it alone, once all members have come.
/// Members wait for each other, each at most the step deadline. Those that cannot meet, because one does not come, two have one
/// index, or sizes differ, are broken off for good: later calls on the plan return what they returned; make another plan.
/// `treeattn_plan_decode` goes on serving, between steps of teams.
///
/// @param plan the plan, of a CPU rank.
/// @param args as for `treeattn_plan_decode`, from member 0; what the others pass is not looked at, and may be NULL.
/// @param team this thread's number and the team. Read during the call.
/// @return as `treeattn_plan_decode` with a NULL stream, the same for all members. INVALID_ARGUMENT: also an index or a size that is
///         out of range, or that does not fit those of the others; where others wait for such a member, their wait ends with the
///         same status. TIMEOUT: also a member that did not come, whose index the message names; then the output is NaN, if
///         member 0 came, and a plan that exchanges breaks its communicator. UNSUPPORTED on GPUs.
///
/// Thread safety: a plan has one team at a time; otherwise as `treeattn_plan_decode`. Blocks: until all members have come at most
/// the step deadline, then until the step has ended. Not capture-safe. Since 0.2.
///
/// # Safety
/// `team` is null or as long as its `struct_size` says, and its barrier is null or does what `treeattn_team_t` says. Of the
/// member with index 0, `args` is as for `treeattn_plan_decode`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_decode_team(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_decode_args_t,
    team: *const treeattn_team_t,
) -> treeattn_status_t {
    guard("treeattn_plan_decode_team", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `team` is null or as long as it says, and its barrier does what it should, by this function's contract.
        let member = unsafe { convert::team_member(&memory::read("team", team)?) };
        // SAFETY: `args` of member 0 is null or as long as it says, by this function's contract.
        let args = || convert::decode_args(&unsafe { memory::read("args", args) }?);
        // SAFETY: what `args` points to stays as it says until the step is done, by this function's contract.
        unsafe { plan.decode_team(&member, args) }
    })
}

/// This rank's partial alone: the output and lse over its own shard, all heads. No exchange, so that it serves on a broken
/// communicator, too.
///
/// @param plan   the plan, with any output mode.
/// @param args   as for `treeattn_plan_decode`; `out` and `lse` hold all query heads.
/// @param stream as for `treeattn_plan_decode`.
/// @return as `treeattn_plan_decode`, without the errors of an exchange.
///
/// Thread safety, blocking, capture: as `treeattn_plan_decode`; waits for no other rank. Since 0.1.
///
/// # Safety
/// `args` is null or as long as its `struct_size` says; what it points to is as `treeattn_decode_args_t` says, readable or
/// writable and used by nobody else, until the step is done. On a GPU, a plan is in flight on one stream at
/// a time, and so are the exchanging steps of a communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_partial(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_decode_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_partial", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `args` is null or as long as it says, by this function's contract.
        let args = convert::decode_args(&unsafe { memory::read("args", args) }?)?;
        let stream = handle::get_optional::<Stream>("stream", stream)?;
        // SAFETY: what `args` points to stays as it says until the step is done, and steps on a GPU are on one stream at a time, by
        // this function's contract.
        unsafe { plan.partial(&args, stream.as_deref()) }
    })
}

/// The exchange alone: every rank passes a partial that the engine made and gets the merged output.
///
/// Collective, as `treeattn_plan_decode`. Serves plans of any shape; one with kv_heads = 0 can do nothing else.
///
/// @param plan   the plan.
/// @param args   the rank's own partial, o [token, head, dim] and lse [token, head], all query heads; kept valid until
///               the step is done.
/// @param stream as for `treeattn_plan_decode`.
/// @return as `treeattn_plan_decode`, without INVALID_DATA.
///
/// Thread safety, blocking, capture: as `treeattn_plan_decode`. Since 0.1.
///
/// # Safety
/// `args` is null or as long as its `struct_size` says; what it points to is as `treeattn_merge_args_t` says, readable or
/// writable and used by nobody else, until the step is done. On a GPU, a plan is in flight on one stream at
/// a time, and so are the exchanging steps of a communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_merge(
    plan: *mut treeattn_plan_t,
    args: *const treeattn_merge_args_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_plan_merge", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `args` is null or as long as it says, by this function's contract.
        let args = convert::merge_args(&unsafe { memory::read("args", args) }?)?;
        let stream = handle::get_optional::<Stream>("stream", stream)?;
        // SAFETY: what `args` points to stays as it says until the step is done, and steps on a GPU are on one stream at a time, by
        // this function's contract.
        unsafe { plan.merge(&args, stream.as_deref()) }
    })
}

/// Tells the memory that a plan holds.
///
/// @param plan   the plan.
/// @param memory set up with TREEATTN_PLAN_MEMORY_INIT; filled.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `memory` is null or writable for as many bytes as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_memory(
    plan: *mut treeattn_plan_t,
    memory: *mut treeattn_plan_memory_t,
) -> treeattn_status_t {
    guard("treeattn_plan_memory", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `memory` is null or writable for its size until this call returns, by this function's contract.
        let memory = unsafe { OutputStruct::new("memory", memory) }?;
        let found = plan.memory()?;
        memory.set(&treeattn_plan_memory_t { struct_size: 0, workspace: found.workspace, window: found.window });
        Ok(())
    })
}

/// Tells what a plan has done so far, which algorithm it uses and why.
///
/// @param plan  the plan.
/// @param stats set up with TREEATTN_PLAN_STATS_INIT; filled.
/// @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block or synchronise; capture-safe. Since 0.1.
///
/// # Safety
/// `stats` is null or writable for as many bytes as its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_plan_stats(
    plan: *mut treeattn_plan_t,
    stats: *mut treeattn_plan_stats_t,
) -> treeattn_status_t {
    guard("treeattn_plan_stats", || {
        let plan = handle::get::<Plan>("plan", plan)?;
        // SAFETY: `stats` is null or writable for its size until this call returns, by this function's contract.
        let stats = unsafe { OutputStruct::new("stats", stats) }?;
        let found = plan.stats()?;
        stats.set(&treeattn_plan_stats_t {
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
            reason: memory::fixed(&found.reason),
            exchange_memory: found.exchange_memory,
        });
        Ok(())
    })
}

/// Destroys a plan when its enqueued work is done, waiting for it at most the step deadline.
///
/// @param plan NULL is fine.
/// @return TREEATTN_OK; BAD_HANDLE; TIMEOUT: work is still under way; the handle is gone, but what that work points to
///         has to stay valid until its stream is synchronised.
///
/// Thread safety: any thread. Blocks, at most the step deadline. During a capture: CAPTURING. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn treeattn_plan_destroy(plan: *mut treeattn_plan_t) -> treeattn_status_t {
    guard("treeattn_plan_destroy", || {
        let Some(plan) = handle::remove_if("plan", plan, Plan::check_destroy)? else {
            return Ok(());
        };
        let deadline = plan.deadline();
        // For the wait, and for all that the plan gives back.
        let _deadline = Deadline::within(deadline);
        let is_done = plan.wait(deadline);
        drop(plan);
        if is_done {
            return Ok(());
        }
        let message = format!("plan: found steps still enqueued after {deadline:?}, wanted none");
        Err(Error::new(ErrorKind::Timeout, message))
    })
}
