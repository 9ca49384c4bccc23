//! Calls that need no communicator: merging in one place, the energy, and the helpers of placement.

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, Output};
use super::types::*;
use crate::attention::placement;
use crate::attention::{Shard, Tensor, head_range};
use crate::error::Error;
use crate::runtime::{Runtime, Stream, energy, merge_partials};

/// Merges n partials that lie in one place (splits of a cache, passes of a kernel) into one. No communicator.
///
/// @param runtime the runtime.
/// @param device  where the tensors are.
/// @param args    o [partial, token, head, dim] and lse [partial, token, head]; `heads` and `head_dim` are required.
///                What it points to has to stay valid until the merge is done.
/// @param n       number of partials, at least 1.
/// @param stream  where to enqueue. NULL on the CPU: runs on the calling thread.
/// @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field, with nothing enqueued or written; BAD_HANDLE;
///         UNAVAILABLE; TIMEOUT: the stream was full.
///
/// Thread safety: any thread. With a stream it enqueues, with NULL it blocks until done; waits for nobody.
/// Capture-safe on CUDA streams. Since 0.1.
///
/// # Safety
/// `args` is null or as long as its `struct_size` says; what it points to is as `treeattn_merge_args_t` says, readable or
/// writable and used by nobody else, until the merge is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_merge_partials(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    args: *const treeattn_merge_args_t,
    n: i32,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_merge_partials", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `args` is null or as long as it says, by this function's contract.
        let args = convert::merge_args(&unsafe { memory::read("args", args) }?)?;
        let count = usize::try_from(n).map_err(|_| Error::invalid("n", n, "at least 1"))?;
        let stream = handle::get_optional::<Stream>("stream", stream)?;
        // SAFETY: what `args` points to stays as it says until the merge is done, by this function's contract.
        unsafe { merge_partials(&runtime, convert::device(device)?, &args, count, stream.as_deref()) }
    })
}

/// The energy F(zeta) = log sum_j exp(scale q.k_j + zeta.v_j) of every query token and head, and its gradient by zeta.
///
/// F(0) is the log-sum-exp of attention and the gradient at 0 its output: the mean of the values under the softmax of the
/// scores; zeta tilts the weights. F is convex. With k = v as stored patterns and zeta = 0, a call is one retrieval step
/// of a modern Hopfield network.
///
/// (gradient, F) is a partial of the keys that are passed: those of several shards, each evaluated at the same zeta,
/// become the whole by `treeattn_merge_partials`, or between ranks by `treeattn_plan_merge`. Sinks join F as they join the
/// softmax, with a value of 0: where partials are merged, have them (`sinks` = 1) in one of the shards only.
///
/// @param runtime the runtime.
/// @param device  where the tensors are; a CPU device in this version.
/// @param desc    the shape; `output`, `algorithm` and `wire_dtype` do not count. Read during the call only.
/// @param args    q, k, v and what describes them as for `treeattn_plan_decode` with one rank; `out` gets the gradient
///                [token, query head, head_dim_v] and `lse` gets F, both for all query heads. Of a shard of several
///                where positions matter, pass `kv_start` or explicit positions.
/// @param zeta    f32 [token, query head, head_dim_v]; shares no byte with the outputs. NULL, or data NULL: 0.
/// @param stream  where to enqueue. NULL: runs on the calling thread.
/// @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field, with nothing enqueued or written; INVALID_DATA: a
///         length, position or page is out of range, and the outputs of its sequence are NaN; NO_MEMORY; SYSTEM;
///         BAD_HANDLE; UNAVAILABLE; TIMEOUT: the stream was full.
///
/// Thread safety: any thread. With a stream it enqueues, with NULL it blocks until done; waits for nobody. Allocates
/// scratch for the call and, where there are many keys, starts a thread a core for it. Not capture-safe. Since 0.1.
///
/// # Safety
/// `desc` and `args` are null or as long as their `struct_size` says; `zeta` is null or readable; what `args` and `zeta`
/// point to is as `treeattn_decode_args_t` and `treeattn_tensor_t` say, readable or writable and used by nobody else, until
/// the evaluation is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_energy(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    desc: *const treeattn_attention_desc_t,
    args: *const treeattn_decode_args_t,
    zeta: *const treeattn_tensor_t,
    stream: *mut treeattn_stream_t,
) -> treeattn_status_t {
    guard("treeattn_energy", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `desc` is null or as long as it says, by this function's contract.
        let desc = convert::attention_desc(&unsafe { memory::read("desc", desc) }?)?;
        // SAFETY: so is `args`.
        let args = convert::decode_args(&unsafe { memory::read("args", args) }?)?;
        let zeta = if zeta.is_null() {
            Tensor::NULL
        } else {
            // SAFETY: not null; readable by this function's contract.
            convert::tensor(&unsafe { memory::value("zeta", zeta) }?)
        };
        let stream = handle::get_optional::<Stream>("stream", stream)?;
        // SAFETY: what `args` and `zeta` point to stays as they say until the evaluation is done, by this function's contract.
        unsafe { energy(&runtime, convert::device(device)?, &desc, &args, &zeta, stream.as_deref()) }
    })
}

/// The heads that a rank owns in a scattered output: floor(rank * heads / world) up to floor((rank + 1) * heads /
/// world), possibly none.
///
/// @param heads number of heads, at least 0.
/// @param world number of ranks, at least 1.
/// @param rank  0 to world - 1.
/// @param first where the first head goes.
/// @param count where the number of heads goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `first` and `count` are null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_head_range(
    heads: i32,
    world: i32,
    rank: i32,
    first: *mut i32,
    count: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_head_range", || {
        let range = head_range(heads, Shard { rank, world })?;
        // SAFETY: both are null or writable until this call returns, by this function's contract.
        let (first, count) = unsafe { (Output::new("first", first)?, Output::new("count", count)?) };
        first.set(range.start);
        count.set(range.end - range.start);
        Ok(())
    })
}

/// The rank that holds a global position.
///
/// Contiguous placement here means the even split: rank r holds positions floor(r * L / world) up to floor((r + 1) * L
/// / world). An engine that cuts elsewhere knows its own cuts.
///
/// @param placement     contiguous or interleaved.
/// @param world         number of ranks, at least 1.
/// @param global_length tokens of the sequence on all ranks.
/// @param position      0 to global_length - 1.
/// @param owner         where the number goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `placement` is null or readable; `owner` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_owner(
    placement: *const treeattn_placement_t,
    world: i32,
    global_length: i32,
    position: i32,
    owner: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_owner", || {
        // SAFETY: `placement` is null or readable, by this function's contract.
        let placement = convert::placement(&unsafe { memory::value("placement", placement) }?)?;
        let found = placement::owner(placement, world, global_length, position)?;
        // SAFETY: `owner` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("owner", owner) }?.set(found);
        Ok(())
    })
}

/// How many tokens of a sequence a rank holds. Note that local(L - k) is not local(L) - k: always ask.
///
/// @param placement     as for `treeattn_placement_owner`.
/// @param world         number of ranks, at least 1.
/// @param rank          0 to world - 1.
/// @param global_length tokens of the sequence on all ranks.
/// @param length        where the number goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `placement` is null or readable; `length` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_local_length(
    placement: *const treeattn_placement_t,
    world: i32,
    rank: i32,
    global_length: i32,
    length: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_local_length", || {
        // SAFETY: `placement` is null or readable, by this function's contract.
        let placement = convert::placement(&unsafe { memory::value("placement", placement) }?)?;
        let shard = Shard { rank, world };
        let found = placement::local_length(placement, shard, global_length)?;
        // SAFETY: `length` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("length", length) }?.set(found);
        Ok(())
    })
}

/// The slot in which the owner of a global position holds it.
///
/// @param placement     as for `treeattn_placement_owner`.
/// @param world         number of ranks, at least 1.
/// @param global_length tokens of the sequence on all ranks.
/// @param position      0 to global_length - 1.
/// @param slot          where the number goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `placement` is null or readable; `slot` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_local_slot(
    placement: *const treeattn_placement_t,
    world: i32,
    global_length: i32,
    position: i32,
    slot: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_local_slot", || {
        // SAFETY: `placement` is null or readable, by this function's contract.
        let placement = convert::placement(&unsafe { memory::value("placement", placement) }?)?;
        let found = placement::local_slot(placement, world, global_length, position)?;
        // SAFETY: `slot` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("slot", slot) }?.set(found);
        Ok(())
    })
}

/// The global position of a rank's local slot.
///
/// @param placement     as for `treeattn_placement_owner`.
/// @param world         number of ranks, at least 1.
/// @param rank          0 to world - 1.
/// @param global_length tokens of the sequence on all ranks.
/// @param slot          0 to the rank's local length - 1.
/// @param position      where the number goes.
/// @return TREEATTN_OK; INVALID_ARGUMENT.
///
/// Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
///
/// # Safety
/// `placement` is null or readable; `position` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_global_position(
    placement: *const treeattn_placement_t,
    world: i32,
    rank: i32,
    global_length: i32,
    slot: i32,
    position: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_global_position", || {
        // SAFETY: `placement` is null or readable, by this function's contract.
        let placement = convert::placement(&unsafe { memory::value("placement", placement) }?)?;
        let shard = Shard { rank, world };
        let found = placement::global_position(placement, shard, global_length, slot)?;
        // SAFETY: `position` is null or writable until this call returns, by this function's contract.
        unsafe { Output::new("position", position) }?.set(found);
        Ok(())
    })
}
