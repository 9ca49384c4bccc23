//! What a plan tells, and what a self-check takes and tells.

use std::ffi::c_char;

use crate::ffi::codes::{treeattn_algorithm_t, treeattn_device_t, treeattn_dtype_t};

/// Memory that a plan holds, in bytes. None of it depends on the length of the cache, but for the blocks of
/// TREEATTN_ALGORITHM_RING. Filled by `treeattn_plan_memory`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_plan_memory_t {
    /// sizeof(treeattn_plan_memory_t).
    pub struct_size: usize,
    /// Scratch of the backend and this rank's partials.
    pub workspace: u64,
    /// This rank's window, shared by all plans of the communicator.
    pub window: u64,
}

/// What a plan has done so far. Filled by `treeattn_plan_stats`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_plan_stats_t {
    /// sizeof(treeattn_plan_stats_t).
    pub struct_size: usize,
    /// The number of this plan on its communicator, from 1.
    pub plan: u64,
    /// Calls of decode, partial and merge on this plan that ran, or were enqueued on a GPU.
    pub steps: u64,
    /// What their exchanges took: rounds among all ranks, levels of the tree, hops of the ring. A step that is larger than
    /// the window takes several.
    pub rounds: u64,
    /// Messages sent to peers.
    pub messages: u64,
    /// Bytes of partials, queries, keys and values sent to peers, each peer counted; headers are not. A peer of the same process
    /// that reads a part of what lies in shared memory was sent that part.
    pub bytes_sent: u64,
    /// The most bytes held at once, workspace and window.
    pub peak_memory: u64,
    /// The exchange algorithm in use.
    pub algorithm: treeattn_algorithm_t,
    /// Element type of partial outputs between ranks.
    pub wire_dtype: treeattn_dtype_t,
    /// First head of this rank's merged output.
    pub head_begin: i32,
    /// One past its last head.
    pub head_end: i32,
    /// Why the algorithm was chosen; cut where it is longer.
    pub reason: [c_char; 256],
    /// Of `peak_memory`, the bytes that the exchange works on: this rank's partial and those that it receives or, with
    /// TREEATTN_ALGORITHM_RING, blocks of keys and values, with room for their scales and masks, and the partials of
    /// some. Windows are not among them.
    pub exchange_memory: u64,
}

/// The sizes of a self-check. 0 is the default of every field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct treeattn_selfcheck_config_t {
    /// sizeof(treeattn_selfcheck_config_t).
    pub struct_size: usize,
    /// Local ranks that the sequences are sharded over. 0: 2 on a CPU, 1 on a GPU.
    pub ranks: i32,
    /// Sequences, at most the descriptor's `max_batch`. The first has `kv_length` keys, the others random lengths up to
    /// that. 0: 2 where the descriptor has room.
    pub batch: i32,
    /// Query tokens of each sequence; batch * query_tokens is at most the descriptor's `max_query_tokens`. 0: 1.
    pub query_tokens: i32,
    /// Keys of the first sequence on all ranks together; each rank's part is at most the descriptor's `max_kv_length`.
    /// 0: 300, or `max_kv_length` where that is less.
    pub kv_length: i32,
    /// Seed of the random inputs.
    pub seed: u64,
    /// Where each rank lives, `[ranks]`, `ranks` not 0: CPUs only or GPUs only, one of them several times where several ranks
    /// live on it. NULL: all on the `device` of the call. Read during the call only. Since 0.2.
    pub devices: *const treeattn_device_t,
}

/// What a self-check found. Filled by `treeattn_selfcheck`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_selfcheck_report_t {
    /// sizeof(treeattn_selfcheck_report_t).
    pub struct_size: usize,
    /// 1: every output is within its bounds and all bits repeat.
    pub passed: i32,
    /// 1: a second run gave the same bits, and all ranks hold the same where all hold the whole output.
    pub same_bits: i32,
    /// Output rows (query token x head, of every rank) compared.
    pub rows: u64,
    /// The largest error of an output element over the usual one ("Accuracy" in README.md); at most 3 in a check that passes.
    pub max_error_ratio: f64,
    /// The same for the log-sum-exps.
    pub max_lse_error_ratio: f64,
    /// Share of the outputs that are the float64 answer correctly rounded; 1 for f32 outputs, where it is not asked.
    pub correctly_rounded: f64,
    /// Root of the summed squared errors over that of the summed squared outputs.
    pub relative_l2: f64,
    /// The first thing found wrong, or a line that says what passed; cut where it is longer.
    pub message: [c_char; 256],
}
