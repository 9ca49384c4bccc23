//! Calls that need no communicator: merging in one place, and the helpers of placement.

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::attention::placement;
use crate::attention::{Shard, head_range};
use crate::error::{Error, Result};
use crate::runtime::{Runtime, Stream, merge_partials};

/// Merges n partials of one place, in order, into one: o [partial, token, head, dim], lse [partial, token, head].
///
/// @param args heads and head_dim must be set.
/// @param n partials, at least 1.
/// @param stream enqueues there; NULL (CPU) runs on the calling thread.
/// @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED; UNAVAILABLE.
///
/// **Ownership**: the caller's buffers stay valid and unchanged until the merge is done; `args` itself is copied.
/// **Threads**: any. Enqueues; blocks with a NULL stream. Capture-safe on CUDA streams. **Since** 0.1.
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
        // SAFETY: as the caller vouches.
        let args = convert::merge_args(&unsafe { convert::read("args", args) }?)?;
        let count = usize::try_from(n).map_err(|_| Error::invalid("n", n, "at least 1"))?;
        let stream = if stream.is_null() { None } else { Some(handle::get::<Stream>("stream", stream)?) };
        // SAFETY: the caller keeps the buffers valid until the merge is done.
        unsafe { merge_partials(&runtime, convert::device(device)?, &args, count, stream.as_deref()) }
    })
}

/// The heads that a rank owns in a scattered output: floor(rank * heads / world) up to floor((rank + 1) * heads / world),
/// possibly none.
///
/// @param first receives the first head.
/// @param count receives the number of heads.
/// @return OK; INVALID_ARGUMENT.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
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
        convert::output("first", first)?;
        convert::output("count", count)?;
        // SAFETY: checked; writable as the caller vouches.
        unsafe {
            *first = range.start;
            *count = range.end - range.start;
        }
        Ok(())
    })
}

/// The rank that holds global position `position` of a sequence of `global_length` tokens. Contiguous placement here means
/// the even split: rank r holds floor(r L / world) up to floor((r + 1) L / world).
///
/// @param owner receives the rank.
/// @return OK; INVALID_ARGUMENT, also with explicit placement.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_owner(
    placement: *const treeattn_placement_t,
    world: i32,
    global_length: i32,
    position: i32,
    owner: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_owner", || {
        // SAFETY: as the caller vouches.
        let placement = unsafe { self::placement(placement) }?;
        // SAFETY: as the caller vouches.
        unsafe { put("owner", owner, placement::owner(placement, world, global_length, position)) }
    })
}

/// How many tokens of a sequence of `global_length` tokens a rank holds. Note that the length of a sequence without its last
/// k tokens is not this one less k: ask again.
///
/// @param length receives the number.
/// @return OK; INVALID_ARGUMENT, also with explicit placement.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_local_length(
    placement: *const treeattn_placement_t,
    world: i32,
    rank: i32,
    global_length: i32,
    length: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_local_length", || {
        // SAFETY: as the caller vouches.
        let placement = unsafe { self::placement(placement) }?;
        let shard = Shard { rank, world };
        // SAFETY: as the caller vouches.
        unsafe { put("length", length, placement::local_length(placement, shard, global_length)) }
    })
}

/// The local slot in which the owner of `position` holds it.
///
/// @param slot receives the slot.
/// @return OK; INVALID_ARGUMENT, also with explicit placement.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_placement_local_slot(
    placement: *const treeattn_placement_t,
    world: i32,
    global_length: i32,
    position: i32,
    slot: *mut i32,
) -> treeattn_status_t {
    guard("treeattn_placement_local_slot", || {
        // SAFETY: as the caller vouches.
        let placement = unsafe { self::placement(placement) }?;
        // SAFETY: as the caller vouches.
        unsafe { put("slot", slot, placement::local_slot(placement, world, global_length, position)) }
    })
}

/// The global position of a rank's local slot.
///
/// @param position receives the position.
/// @return OK; INVALID_ARGUMENT, also with explicit placement.
///
/// **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
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
        // SAFETY: as the caller vouches.
        let placement = unsafe { self::placement(placement) }?;
        let shard = Shard { rank, world };
        // SAFETY: as the caller vouches.
        unsafe { put("position", position, placement::global_position(placement, shard, global_length, slot)) }
    })
}

/// # Safety
/// `placement` is null or readable.
unsafe fn placement(placement: *const treeattn_placement_t) -> Result<placement::Placement> {
    convert::output("placement", placement.cast_mut())?;
    // SAFETY: checked; readable as the caller vouches.
    convert::placement(unsafe { &*placement })
}

/// Writes a result where there is one.
///
/// # Safety
/// `to` is null or writable.
unsafe fn put(name: &str, to: *mut i32, value: Result<i32>) -> Result<()> {
    let value = value?;
    convert::output(name, to)?;
    // SAFETY: checked; writable as the caller vouches.
    unsafe { *to = value };
    Ok(())
}
