//! Structs: every one starts with `struct_size`, but for those that others hold by value, which are frozen. No struct
//! has implicit padding; `layout` holds sizes and offsets.

use std::ffi::{c_char, c_void};

use super::codes::*;
use super::memory::Versioned;

/// A process's use of the library. Made by `treeattn_runtime_create`.
pub struct treeattn_runtime_t {
    _private: [u8; 0],
}

/// An in-order queue of steps on one device. Made by `treeattn_stream_create`.
pub struct treeattn_stream_t {
    _private: [u8; 0],
}

/// Memory of a device, a convenience. Made by `treeattn_buffer_alloc`.
pub struct treeattn_buffer_t {
    _private: [u8; 0],
}

/// One rank's end of a communicator. Made by one of the calls `treeattn_comm_create_*` and `treeattn_comm_wrap_nccl`.
pub struct treeattn_comm_t {
    _private: [u8; 0],
}

/// A shape made ready on one rank. Made by `treeattn_plan_create`.
pub struct treeattn_plan_t {
    _private: [u8; 0],
}

/// Receives log lines. Called from any thread, also the library's own, with a text that is valid during the call; must
/// not call the library, unwind or jump out.
pub type treeattn_log_callback_t =
    Option<unsafe extern "C" fn(level: treeattn_log_level_t, message: *const c_char, user_data: *mut c_void)>;

/// What `treeattn_runtime_create` takes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_runtime_config_t {
    /// sizeof(treeattn_runtime_config_t).
    pub struct_size: usize,
    /// Instruction set of the CPU backend: "scalar", "avx2", "avx512" or "neon". NULL: what the environment variable
    /// TREEATTN_CPU_ISA said when the process made its first runtime, else the best that the machine has. A word there that
    /// cannot be served is ignored, as `isa` of treeattn_device_info_t then says.
    pub cpu_isa: *const c_char,
}

/// What a device is. Filled by `treeattn_runtime_device_info`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_device_info_t {
    /// sizeof(treeattn_device_info_t).
    pub struct_size: usize,
    /// The device.
    pub device: treeattn_device_t,
    /// Processor cores that this process may use, or streaming multiprocessors.
    pub units: i32,
    /// Its memory in bytes.
    pub memory: u64,
    /// Its maker's name for it; cut where it is longer.
    pub name: [c_char; 128],
    /// The instruction set in use, and why where it was asked for; or the compute capability. Cut where it is longer.
    pub isa: [c_char; 256],
}

/// The engine's own parallel-for (OpenMP, a pool): what a CPU rank computes its steps with, instead of threads of the library,
/// which then starts none to compute. Set up with TREEATTN_EXECUTOR_INIT. The bits are those of as many threads of the
/// library's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_executor_t {
    /// sizeof(treeattn_executor_t).
    pub struct_size: usize,
    /// Passed to `parallel`. Stays valid until the communicator and all its plans are destroyed, and the steps enqueued on
    /// them are done.
    pub ctx: *mut c_void,
    /// Into how many tasks work is cut, 1 to 1,024: as many as `parallel` runs at a time.
    pub threads: i32,
    /// TREEATTN_EXECUTOR_ flags.
    pub flags: u32,
    /// Calls `task(data, i)` once for every i from 0 to n - 1, on whatever threads, the calling one among them or not, and
    /// returns 0 when all have returned. n is `threads`. Required.
    ///
    /// Runs on the thread that called the library, inside that call, or on that of a CPU stream; a step takes one call or a few.
    /// One call runs at a time for a rank; those of several ranks, which share the function where
    /// `treeattn_comm_create_local` made them, may meet and do not wait for each other. It must not call the library, unwind
    /// or jump out. The library waits for it as long as it takes: no deadline ends it.
    ///
    /// Another return value, a task that is left out, runs twice or has a number that was not asked for is
    /// TREEATTN_ERROR_EXECUTOR of the step, after the tasks that have begun have ended; the message says which. A task
    /// takes 64 KiB of stack, keeps the thread's floating-point settings, does not unwind, and may safely be called too often, or
    /// when `parallel` has returned or everything is destroyed: it then does nothing.
    pub parallel: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            n: i32,
            task: Option<unsafe extern "C" fn(data: *mut c_void, i: i32)>,
            data: *mut c_void,
        ) -> i32,
    >,
}

/// How a communicator waits and what it may use. The same on every rank.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_comm_config_t {
    /// sizeof(treeattn_comm_config_t).
    pub struct_size: usize,
    /// How long creating the communicator and its plans may wait for the other ranks, in nanoseconds, at most a year.
    /// 0: 30 s.
    pub setup_timeout_ns: i64,
    /// How long a step may wait for the other ranks, in nanoseconds, at most a year. 0: 10 s.
    pub step_timeout_ns: i64,
    /// Worker threads of a CPU rank, the calling thread among them. 0: the cores of its device over the local ranks on that
    /// device, at least 1, or the `threads` of the executor.
    pub threads_per_rank: i32,
    /// Ranks of the same group count as one node; the tree algorithm merges within a node first. This one may differ from
    /// rank to rank. 0 over an engine's transport: the ranks of a machine are a node.
    pub node_group: i32,
    /// Path of the NCCL library to load. NULL: looked for.
    pub nccl_path: *const c_char,
    /// `treeattn_comm_create_local` only: the group of each of its n ranks. NULL: `node_group` for all.
    pub node_groups: *const i32,
    /// The engine's threads, to compute the steps of CPU ranks on; read during the call. `threads_per_rank` is then 0 or its
    /// `threads`. May differ from rank to rank. NULL: the library's own threads, and on GPUs. Since 0.2.
    pub executor: *const treeattn_executor_t,
    /// The most members of a team that runs steps of this rank (`treeattn_plan_decode_team`), at most 1,024. 0: as many as the
    /// rank has threads. The scratch of plans grows with it. May differ from rank to rank. 0 on GPUs. Since 0.2.
    pub max_team: i32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: i32,
}

/// The health of a communicator. Filled by `treeattn_comm_status`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_comm_status_t {
    /// sizeof(treeattn_comm_status_t).
    pub struct_size: usize,
    /// TREEATTN_OK, why the communicator is broken, or TREEATTN_ERROR_INVALID_DATA or TREEATTN_ERROR_MISMATCH of a step.
    pub code: treeattn_status_t,
    /// The rank that the error is about, -1 if none.
    pub rank: i32,
    /// Steps of all plans of this rank that exchanged, each counted once whatever its algorithm and size: completed on a CPU,
    /// enqueued on a GPU. (`steps` of `treeattn_plan_stats_t` counts those of one plan, also without exchange.)
    pub step: u64,
    /// The plan of the last step by its number on the communicator (from 1; see `treeattn_plan_stats_t`), 0 before the
    /// first; with INVALID_DATA the plan that met it.
    pub plan: u64,
    /// The first sequence that `rank` found bad data in, or in which ranks do not fit together; -1 if none.
    pub sequence: i32,
    /// 1: no exchange will succeed any more; destroy the communicator and make a new one.
    pub broken: i32,
    /// The message that goes with `code`; empty if there is none, cut where it is longer. With INVALID_DATA every rank is told
    /// the argument, the sequence and the rank that met it; the value found and the values wanted only that rank, on CPUs.
    pub message: [c_char; 512],
}

/// A caller's buffer with byte strides; what the dimensions are is said where the tensor is used. Frozen: no
/// struct_size.
///
/// All strides zero means packed, row-major; how many tokens a packed cache has room for is said at `kv_capacity` of
/// `treeattn_decode_args_t`. Otherwise every stride is taken as it is, so that a zero broadcasts (inputs only, and not the
/// elements of a row of keys or values). The library touches nothing outside `bytes` bytes from `data`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_tensor_t {
    /// First element, on the plan's device. Aligned to the element (to 4 bytes at most).
    pub data: *mut c_void,
    /// Bytes from `data` that the library may touch.
    pub bytes: u64,
    /// Byte strides, outermost dimension first, each at least 0 and a multiple of the element's size; those past the last
    /// dimension are ignored.
    pub stride: [i64; 4],
}

/// Which rank holds which token. Frozen: no struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_placement_t {
    /// The kind.
    pub kind: treeattn_placement_kind_t,
    /// Tokens a run with TREEATTN_PLACEMENT_INTERLEAVED, at least 1; else 0.
    pub interleave: i32,
}

/// An attention shape: what stays the same from step to step, and is the same on every rank.
///
/// `kv_heads` = 0 describes a merge-only plan: the engine makes the partials, and only `q_heads`, `head_dim_v`,
/// `max_query_tokens`, `out_dtype`, `wire_dtype`, `output` and `algorithm` count. A field whose capability this build
/// lacks is TREEATTN_ERROR_UNSUPPORTED, by name.
///
/// The score of a query at global position i and a key at j, of query head h, is
///
/// `s = cap(scale * q.k) - slope[h] * |i - j| + factor[h] * mask[i][j]`, where `cap(x) = softcap * tanh(x / softcap)`,
///
/// and the output is the mean of the values under the softmax of the scores of the keys that the query sees, with `exp(sink[h])`
/// in its denominator. Terms that are off drop out, the others may be combined; this is also the order of ggml (whose ALiBi is
/// `factor[h] * mask`) and of FlashAttention. A key that `causal`, `window`, or a mask of -inf or boolean 0 hides has no influence
/// on the row, whatever it holds. Scores times log2 e have to be within float32: one above makes its row NaN, one below weighs
/// nothing. "Accuracy" in README.md has the error that no output exceeds.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_attention_desc_t {
    /// sizeof(treeattn_attention_desc_t).
    pub struct_size: usize,
    /// Query heads, at least 1.
    pub q_heads: i32,
    /// Key and value heads, a divisor of `q_heads`. 0: a merge-only plan.
    pub kv_heads: i32,
    /// Dimension of q and k, 1 to 1024.
    pub head_dim_qk: i32,
    /// Dimension of v and of the output, 1 to 1024. May differ from `head_dim_qk`.
    pub head_dim_v: i32,
    /// Element type of q: f32, f16 or bf16.
    pub q_dtype: treeattn_dtype_t,
    /// Element type of k.
    pub k_dtype: treeattn_dtype_t,
    /// Element type of v.
    pub v_dtype: treeattn_dtype_t,
    /// Element type of the output: f32, f16 or bf16.
    pub out_dtype: treeattn_dtype_t,
    /// Layout of k and v.
    pub kv_layout: treeattn_kv_layout_t,
    /// Tokens a page, at least 1; 0 for the strided layout.
    pub page_size: i32,
    /// Which rank holds which token.
    pub placement: treeattn_placement_t,
    /// Most sequences in a step, at least 1.
    pub max_batch: i32,
    /// Most query tokens in a step, all sequences together, at least 1.
    pub max_query_tokens: i32,
    /// Most tokens of one sequence on one rank, at least 1. Costs no memory but with TREEATTN_ALGORITHM_RING, whose blocks it
    /// sizes.
    pub max_kv_length: i32,
    /// Multiplies q.k; 0: 1/sqrt(head_dim_qk).
    pub scale: f32,
    /// 1: a query does not see keys at later global positions. Its own token is a key like the others: put it into the
    /// cache first.
    pub causal: i32,
    /// A query at global position p sees no key before p - window + 1: with `causal` = 1 the last `window` keys up to its
    /// own, its own token among them, whatever ranks hold them. With `causal` = 0 it sees all later keys, too. 0: no window.
    /// Keys outside the windows of all query tokens of a sequence are not read, but for explicit positions on GPUs. At least 0.
    pub window: i32,
    /// Scores become softcap * tanh(score / softcap), after `scale`. 0: off. Finite, at least 0.
    pub softcap: f32,
    /// 1: the slope of the query head (`alibi_slopes`) times the distance of the global positions is subtracted.
    pub alibi: i32,
    /// 1: a sink for each query head joins the softmax of every row, once and not per rank (`sinks` of
    /// `treeattn_decode_args_t`): lse = log(exp(sink) + sum_j exp(s_j)), and the outputs shrink accordingly. A row that sees no
    /// key is 0 with lse = sink; rows of no sequence stay 0 with lse -inf. The partial of rank 0 holds the sinks, also with
    /// TREEATTN_OUTPUT_LOCAL and from `treeattn_plan_partial`, so that merging all partials counts them once.
    pub sinks: i32,
    /// A mask of the step (`mask` of `treeattn_decode_args_t`), beside `causal` and `window`: a key is seen where all agree.
    pub mask: treeattn_mask_kind_t,
    /// Element type of an additive mask: f16 or f32; 0 with none and with a boolean one.
    pub mask_dtype: treeattn_dtype_t,
    /// What each rank passes as q.
    pub query_input: treeattn_query_input_t,
    /// Who gets the merged output.
    pub output: treeattn_output_t,
    /// How partials meet.
    pub algorithm: treeattn_algorithm_t,
    /// Which bits are promised to be the same.
    pub reproducibility: treeattn_reproducibility_t,
    /// Element type of partial outputs on their way between ranks: f32, f16 or bf16. 0: f32. Finite values
    /// beyond its range travel as its largest number. The lse always travels as f32, two of them between CPU ranks.
    pub wire_dtype: treeattn_dtype_t,
    /// TREEATTN_ATTENTION_ flags.
    pub flags: u32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: u32,
}

/// The arguments of one decode step on one rank. Pointers are to memory of the plan's device.
///
/// Lengths, starts, positions and tables are read while the step runs, and checked there before any address is formed
/// from them: what is out of range gives NaN for that sequence and TREEATTN_ERROR_INVALID_DATA. Rows that see no key, and
/// rows from `query_start[batch]` on, are valid padding: out 0, lse -inf.
///
/// An argument that the layout or the placement has no use for (a block table with a strided cache, `kv_start` with
/// interleaved placement) is TREEATTN_ERROR_INVALID_ARGUMENT. On CPUs, whose memory the call can read, so is what cannot be
/// meant: `k.bytes` too small for the lengths, `max_pages` or `num_pages` 0; `query_start[0]` other than 0; of a sequence with
/// queries and a `global_length` also kv_start + length above it and, with interleaved placement, a length other than what
/// the rank holds of it (for `treeattn_plan_partial` and `treeattn_energy`: more than that); of plans that are CHECKED the
/// ranks find the latter together, as MISMATCH. What lies in a GPU's memory the
/// call cannot read: there the former are INVALID_DATA of the step, and the latter are looked at only by steps of plans that are
/// CHECKED.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_decode_args_t {
    /// sizeof(treeattn_decode_args_t).
    pub struct_size: usize,
    /// Sequences in this step, 0 to `max_batch`.
    pub batch: i32,
    /// Query tokens of all sequences together, 0 to `max_query_tokens`: an upper bound of `query_start[batch]`.
    pub query_tokens: i32,
    /// Queries [token, query head, dim].
    pub q: treeattn_tensor_t,
    /// Keys [sequence, token, kv head, dim], or [page, slot, kv head, dim]. Packed (all strides 0) and strided, the tokens of a
    /// sequence are as many as `kv_capacity` says. `bytes` may end where the tokens of the last sequence do; on a GPU no
    /// sequence may then be longer than the last has room for. Last stride 0 with dim above 1 is refused.
    pub k: treeattn_tensor_t,
    /// Values, as the keys. May be a view of the keys.
    pub v: treeattn_tensor_t,
    /// Output [token, query head, dim]; with a scattered output the rank's own heads only. Its `bytes` bytes, gaps between rows
    /// included, overlap those of no input and not those of `lse`. No two elements share a byte: each dimension steps over the
    /// whole of those with smaller strides.
    pub out: treeattn_tensor_t,
    /// Natural log-sum-exp of the scaled scores, f32 [token, query head], heads as `out`. data NULL: not wanted.
    pub lse: treeattn_tensor_t,
    /// `int32 [batch + 1]`: first query token of each sequence, ascending from 0. NULL: query_tokens / batch each, which then
    /// leaves no remainder.
    pub query_start: *const i32,
    /// `int32 [batch]`: tokens of each sequence on this rank, 0 to `max_kv_length`. NULL only for CSR pages, which take exactly
    /// one of `kv_length` and `last_page_len`.
    pub kv_length: *const i32,
    /// `int32 [batch]`: tokens of each sequence on all ranks together, this step's query tokens included. Required where
    /// global positions matter (causal, window, ALiBi) and `query_position` is NULL; elsewhere welcome, since the lengths of
    /// this rank are held against it. Keys past it: see TREEATTN_ATTENTION_SURPLUS_KEYS.
    pub global_length: *const i32,
    /// `int32 [batch]`, contiguous placement: global position of local slot 0. NULL: 0, with one rank.
    pub kv_start: *const i32,
    /// int32, explicit placement: global position of each local slot; row b begins at element b * kv_position_stride.
    pub kv_position: *const i32,
    /// Elements between the rows of `kv_position`. 0: `max_kv_length`.
    pub kv_position_stride: i64,
    /// `int32 [query_tokens]`: global position of each query token. NULL: the last of the sequence, in order.
    pub query_position: *const i32,
    /// `int32 [batch, max_pages]`, block table layout: the pages of each sequence. Entries past its length are unused.
    pub block_table: *const i32,
    /// Entries of a row of `block_table`.
    pub max_pages: i32,
    /// Pages that exist in k and v.
    pub num_pages: i32,
    /// `int32 [batch + 1]`, CSR pages: first entry of each sequence in `page_indices`.
    pub page_indptr: *const i32,
    /// `int32 [num_page_indices]`, CSR pages: the pages, sequence after sequence.
    pub page_indices: *const i32,
    /// Entries of `page_indices`.
    pub num_page_indices: i64,
    /// `int32 [batch]`, CSR pages: tokens in each sequence's last page, 1 to page_size, instead of `kv_length`.
    pub last_page_len: *const i32,
    /// Scales of keys, f32 [sequence or page, token or slot, kv head], of any `k_dtype`: key = scale * what k holds. Strides are
    /// taken as they are, any may be 0: {0, 0, 0} is one scale for all, {0, 0, 4} one a kv head. `bytes` may end where the
    /// last sequence does, as those of k; nothing past a length is read. A scale that is no finite number makes NaN of what
    /// sees it. Products of queries with what k holds have to be within f32. Each rank has its own. data NULL: 1, but with
    /// TREEATTN_DTYPE_INT8, whose keys need scales, TREEATTN_ERROR_INVALID_ARGUMENT.
    pub k_scale: treeattn_tensor_t,
    /// Scales of values, as `k_scale`: value = scale * what v holds.
    pub v_scale: treeattn_tensor_t,
    /// `f32 [query head]`: the slopes of `alibi`, at any stride. Required with `alibi` = 1, the same on every rank; NULL without.
    pub alibi_slopes: treeattn_tensor_t,
    /// `f32 [query head]`: logits that join the softmax, not scaled. Required where the plan has sinks. The same on every rank.
    /// -inf is none. NaN and +inf make their rows NaN. NULL without sinks.
    pub sinks: treeattn_tensor_t,
    /// Mask [sequence, query head, query token of the sequence, local slot] of `mask_dtype`, or bytes of a boolean one.
    /// Strides are taken as they are, 0 broadcasts; all four 0 is refused. Slots are those of this rank: the element for the
    /// key in its slot s of sequence b, whatever pages it lies in. Additive: added to the score; -inf hides, whatever the
    /// factor; NaN makes the rows NaN that would see the key. Boolean: 0 hides, all else is visible. `bytes` covers what the
    /// lengths and query tokens of the step reach; elements past a length are not read, so that rows may be padded. On
    /// CPUs tiles of 64 keys that are hidden from all rows are not read; on GPUs a mask that does not reach so far is
    /// TREEATTN_ERROR_INVALID_DATA of the sequence. data NULL: no sequence with queries has keys here.
    pub mask: treeattn_tensor_t,
    /// Tokens that a packed strided k or v (all strides 0) has room for in each sequence: it is [batch, kv_capacity, kv head,
    /// dim]. May be 0 for one sequence, and where `bytes` is just the size of [batch or `max_batch`, `max_kv_length`, kv head,
    /// dim] or, with batch = `max_batch`, of fewer tokens. 0 where k and v have strides, and in other layouts. Since 0.2.
    pub kv_capacity: i32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: i32,
    /// `f32 [query head]`, additive masks: what their values are multiplied by, as the slopes of ggml's ALiBi. data NULL: 1. The
    /// same on every rank. Since 0.2.
    pub mask_factor: treeattn_tensor_t,
    /// With TREEATTN_ATTENTION_PAGES_BY_HEAD, elements between the lists of kv heads in `page_indices`: kv head h reads the page of
    /// slot s of sequence b from entry `page_indptr[b] + h * page_index_head_stride + s / page_size`. All heads of a sequence have
    /// the same number of tokens; a mask takes out what a head lacks. 0: they share their lists. `num_page_indices` counts the
    /// entries of all heads. Entries past a list are not read. Since 0.2.
    pub page_index_head_stride: i64,
    /// With TREEATTN_ATTENTION_PAGES_BY_HEAD and explicit placement, elements between the rows of kv heads in `kv_position`: that of
    /// kv head h of sequence b begins at element b * kv_position_stride + h * kv_position_head_stride. 0: they share them. Since
    /// 0.2.
    pub kv_position_head_stride: i64,
}

/// One thread of an engine's team, of which every thread enters `treeattn_plan_decode_team`. Set up with TREEATTN_TEAM_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_team_t {
    /// sizeof(treeattn_team_t).
    pub struct_size: usize,
    /// Which member this thread is, 0 to size - 1, each once.
    pub index: i32,
    /// Members of the team in this step, the same for all, 1 to the `max_team` of the communicator. May differ from step to step,
    /// once the step before has returned on all of its members.
    pub size: i32,
    /// The team's barrier: returns when every member has called it as often as this one. Called only when all members have come,
    /// by each of them equally often. Only how members wait: what they wait for the library sees itself. It must not call the
    /// library, unwind or jump out. One function for all members; NULL, for all: they spin for at most 20 us, then sleep.
    pub barrier: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// Passed to `barrier`; each member has its own.
    pub ctx: *mut c_void,
}

/// Partials to merge and where the result goes.
///
/// For `treeattn_merge_partials` o is [partial, token, head, dim] and lse [partial, token, head]; for
/// `treeattn_plan_merge` each rank passes its own partial, o [token, head, dim] and lse [token, head].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_merge_args_t {
    /// sizeof(treeattn_merge_args_t).
    pub struct_size: usize,
    /// Query tokens.
    pub query_tokens: i32,
    /// Heads of the partials. 0: the plan's `q_heads`.
    pub heads: i32,
    /// Elements of a row. 0: the plan's `head_dim_v`.
    pub head_dim: i32,
    /// Element type of `o`: f32, f16 or bf16.
    pub o_dtype: treeattn_dtype_t,
    /// Element type of `out`. 0: the plan's `out_dtype`; for `treeattn_merge_partials` that of `o`.
    pub out_dtype: treeattn_dtype_t,
    /// Base of the incoming lse: 0 for e, or 2. The outgoing lse is always natural.
    pub lse_base: i32,
    /// TREEATTN_MERGE_ flags.
    pub flags: u32,
    /// Zero; keeps what follows aligned.
    pub reserved: u32,
    /// Normalised outputs of the partials. A row whose lse says empty (-inf) is never read.
    pub o: treeattn_tensor_t,
    /// Log-sum-exps of the partials, f32. NaN makes its row NaN, and so does +inf without TREEATTN_MERGE_PLUS_INF_IS_EMPTY.
    pub lse: treeattn_tensor_t,
    /// Merged output [token, head, dim]; with a scattered plan the rank's own heads. Its `bytes` bytes overlap those of no other
    /// tensor.
    pub out: treeattn_tensor_t,
    /// Merged natural log-sum-exp, f32 [token, head]. data NULL: not wanted.
    pub out_lse: treeattn_tensor_t,
}

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
    /// Bytes of partials, keys and values sent to peers, each peer counted; headers are not. A peer of the same process
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

/// The engine's own way to exchange small blobs in host memory (MPI, gloo, sockets): what
/// `treeattn_comm_create_from_transport` takes.
///
/// Threads: a callback runs on the thread that called the library, inside that call, and on the threads of CPU streams
/// only with TREEATTN_TRANSPORT_STREAM_THREADS. One callback of a communicator runs at a time; those of two
/// communicators may meet. It may block, must not call the library but for `treeattn_comm_abort` and
/// `treeattn_comm_status`, and must not unwind or jump out.
///
/// Deadline: `timeout_ns` is what is left of the step's or the setup's time; `*abort` becomes 1 on an abort from any
/// thread, and by the library's own clock once the time is over. A callback returns, with anything but 0, when either
/// has come: it looks at both at least every 100 ms, `*abort` as a volatile or an atomic. So no call outlasts its
/// deadline by more than a second; one that waits for neither holds its caller for as long as it waits.
///
/// Memory: `send` and `recv` are the library's, of any alignment, and do not overlap; `recv` may hold anything after a
/// callback that failed. Both are gone when it has returned: an operation that cannot be cancelled (an MPI request)
/// needs buffers of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_transport_t {
    /// sizeof(treeattn_transport_t).
    pub struct_size: usize,
    /// Passed to every callback. Stays valid until the communicator and all its plans are destroyed, and the steps
    /// enqueued on them are done.
    pub ctx: *mut c_void,
    /// Gathers `bytes` bytes (1 to 1 MiB, the same on every rank) from every rank into `recv` (world * bytes), in rank
    /// order. Returns 0 when done, else anything: the call then fails with TREEATTN_ERROR_TRANSPORT, TIMEOUT or
    /// ABORTED, and the communicator is broken on this rank. Required.
    pub allgather: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            bytes: usize,
            timeout_ns: i64,
            abort: *const i32,
        ) -> i32,
    >,
    /// Sends `send_bytes` bytes to rank `to` and receives `recv_bytes` from rank `from` at once; otherwise as
    /// `allgather`. Where one of the sizes is 0 nothing goes that way, and that peer makes no call for it. NULL:
    /// TREEATTN_ALGORITHM_TREE and TREEATTN_ALGORITHM_RING, which need it, are TREEATTN_ERROR_UNSUPPORTED.
    pub sendrecv: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            send_bytes: usize,
            to: i32,
            recv: *mut c_void,
            recv_bytes: usize,
            from: i32,
            timeout_ns: i64,
            abort: *const i32,
        ) -> i32,
    >,
    /// TREEATTN_TRANSPORT_ flags.
    pub flags: u32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: u32,
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
    /// The largest error of an output element over the bound of that element; at most 1 in a check that passes.
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

macro_rules! versioned {
    ($($name:ident $first:literal)+) => {
        // SAFETY: each is repr(C) and begins with `struct_size` (`layout` holds the offsets); its other fields are numbers,
        // arrays of numbers, raw pointers and optional functions, of all of which zeros are a value.
        $(unsafe impl Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = $first;
        })+
    };
}

// Every struct with its size in the first version that had it, which never changes; that of today is in `layout`.
versioned! {
    treeattn_runtime_config_t 16
    treeattn_device_info_t 408
    treeattn_executor_t 32
    treeattn_comm_config_t 48
    treeattn_team_t 32
    treeattn_comm_status_t 552
    treeattn_attention_desc_t 128
    treeattn_decode_args_t 600
    treeattn_merge_args_t 232
    treeattn_plan_memory_t 24
    treeattn_plan_stats_t 336
    treeattn_transport_t 40
    treeattn_selfcheck_config_t 32
    treeattn_selfcheck_report_t 312
}
