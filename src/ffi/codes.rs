//! Codes: int32 types with their values. Newtypes, never enums, so that a value the library does not know is no
//! undefined behaviour. Values are never reused.

/// Outcome of a call: `TREEATTN_OK` or a positive `TREEATTN_ERROR_` code.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct treeattn_status_t(pub i32);

/// The call did what it says.
pub const TREEATTN_OK: treeattn_status_t = treeattn_status_t(0);
/// An argument is outside what the call accepts.
pub const TREEATTN_ERROR_INVALID_ARGUMENT: treeattn_status_t = treeattn_status_t(1);
/// A handle is NULL, foreign, destroyed or of another type.
pub const TREEATTN_ERROR_BAD_HANDLE: treeattn_status_t = treeattn_status_t(2);
/// The object that this one was made from has been destroyed. Destroying this one still works.
pub const TREEATTN_ERROR_PARENT_DESTROYED: treeattn_status_t = treeattn_status_t(3);
/// A valid request for something that this build does not do; the message names the field.
pub const TREEATTN_ERROR_UNSUPPORTED: treeattn_status_t = treeattn_status_t(4);
/// A library or device that the request needs is not on this machine.
pub const TREEATTN_ERROR_UNAVAILABLE: treeattn_status_t = treeattn_status_t(5);
/// The ranks passed different descriptors to a collective creation; the message names the field and the ranks. Or different
/// inputs to a step of a plan with TREEATTN_ATTENTION_CHECKED; then the communicator stays usable.
pub const TREEATTN_ERROR_MISMATCH: treeattn_status_t = treeattn_status_t(6);
/// The ranks issued different exchanging calls. The communicator is broken. On CPUs the message tells what they issued.
pub const TREEATTN_ERROR_DESYNC: treeattn_status_t = treeattn_status_t(7);
/// A rank did not come before the deadline. The communicator is broken (unless the wait was for a full stream).
pub const TREEATTN_ERROR_TIMEOUT: treeattn_status_t = treeattn_status_t(8);
/// A rank was seen to leave. The communicator is broken.
pub const TREEATTN_ERROR_PEER_LOST: treeattn_status_t = treeattn_status_t(9);
/// The communicator was aborted. It is broken.
pub const TREEATTN_ERROR_ABORTED: treeattn_status_t = treeattn_status_t(10);
/// A length, position or table entry read during the step is out of range. The outputs of that sequence are NaN on
/// every rank, all others are good, and the communicator stays usable.
pub const TREEATTN_ERROR_INVALID_DATA: treeattn_status_t = treeattn_status_t(11);
/// Host memory could not be had.
pub const TREEATTN_ERROR_NO_MEMORY: treeattn_status_t = treeattn_status_t(12);
/// Device memory could not be had.
pub const TREEATTN_ERROR_NO_DEVICE_MEMORY: treeattn_status_t = treeattn_status_t(13);
/// The call cannot be made while a stream is being captured; the capture is intact.
pub const TREEATTN_ERROR_CAPTURING: treeattn_status_t = treeattn_status_t(14);
/// A CUDA call failed.
pub const TREEATTN_ERROR_CUDA: treeattn_status_t = treeattn_status_t(15);
/// The CUDA context is lost; only destroy calls still work on its objects.
pub const TREEATTN_ERROR_CUDA_FATAL: treeattn_status_t = treeattn_status_t(16);
/// An asynchronous CUDA error was pending before the call.
pub const TREEATTN_ERROR_CUDA_PRIOR: treeattn_status_t = treeattn_status_t(17);
/// An NCCL call failed.
pub const TREEATTN_ERROR_NCCL: treeattn_status_t = treeattn_status_t(18);
/// A callback of the engine's transport failed.
pub const TREEATTN_ERROR_TRANSPORT: treeattn_status_t = treeattn_status_t(19);
/// The operating system refused something (a thread, a file).
pub const TREEATTN_ERROR_SYSTEM: treeattn_status_t = treeattn_status_t(20);
/// A defect of the library, caught before it reached the caller. The process goes on; please report it.
pub const TREEATTN_ERROR_INTERNAL: treeattn_status_t = treeattn_status_t(21);
/// The object is in use by another call that must end first.
pub const TREEATTN_ERROR_BUSY: treeattn_status_t = treeattn_status_t(22);
/// The engine's executor did not do what it promised. Since 0.2.
pub const TREEATTN_ERROR_EXECUTOR: treeattn_status_t = treeattn_status_t(23);

/// A device: kind * 65536 + ordinal. Make it with `TREEATTN_CPU(n)`, `TREEATTN_CUDA(n)` or `TREEATTN_DEVICE(kind, n)`.
pub type treeattn_device_t = i32;

/// What kind of device.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_device_kind_t(pub i32);

/// The processors of this machine: together the device with ordinal 0, those of NUMA node n that with ordinal 1 + n.
pub const TREEATTN_DEVICE_CPU: treeattn_device_kind_t = treeattn_device_kind_t(0);
/// A CUDA GPU, by the driver's ordinal.
pub const TREEATTN_DEVICE_CUDA: treeattn_device_kind_t = treeattn_device_kind_t(1);

/// How weighty a log line is.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_log_level_t(pub i32);

/// Something failed.
pub const TREEATTN_LOG_ERROR: treeattn_log_level_t = treeattn_log_level_t(1);
/// Something works, but not as asked.
pub const TREEATTN_LOG_WARNING: treeattn_log_level_t = treeattn_log_level_t(2);
/// A choice that the library made.
pub const TREEATTN_LOG_INFO: treeattn_log_level_t = treeattn_log_level_t(3);

/// Element type of a tensor. 0 is no type: where a field has a default, 0 selects it, elsewhere it is refused.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_dtype_t(pub i32);

/// IEEE binary32, 4 bytes.
pub const TREEATTN_DTYPE_F32: treeattn_dtype_t = treeattn_dtype_t(1);
/// IEEE binary16, 2 bytes.
pub const TREEATTN_DTYPE_F16: treeattn_dtype_t = treeattn_dtype_t(2);
/// bfloat16, 2 bytes.
pub const TREEATTN_DTYPE_BF16: treeattn_dtype_t = treeattn_dtype_t(3);
/// OCP fp8 with 4 exponent bits of bias 7 and no infinities (e4m3fn), 1 byte: 0x7f and 0xff are NaN. Keys and values.
pub const TREEATTN_DTYPE_F8_E4M3: treeattn_dtype_t = treeattn_dtype_t(4);
/// OCP fp8 with 5 exponent bits of bias 15, the upper half of an f16, 1 byte: with infinities and NaN. Keys and values.
pub const TREEATTN_DTYPE_F8_E5M2: treeattn_dtype_t = treeattn_dtype_t(5);
/// ggml blocks of 32 values, 34 bytes: an f16 scale d and 32 int8 q, value d * q. Keys and values.
///
/// Of all ggml types: blocks run along the head dimension, which is a multiple of 32, one behind the other (last stride: the
/// bytes of a block); addresses and strides are multiples of 2, and blocks need no more alignment than that. Bytes and values
/// are ggml's own: integers are little-endian, products are exact in f32, and a sum with a minimum is rounded to f32 once. Of
/// 4 bits, byte i holds value i in its low half and value i + 16 in its high half.
pub const TREEATTN_DTYPE_Q8_0: treeattn_dtype_t = treeattn_dtype_t(6);
/// ggml blocks of 32 values, 18 bytes: an f16 scale d and 32 times 4 bits q, value d * (q - 8). Keys and values.
pub const TREEATTN_DTYPE_Q4_0: treeattn_dtype_t = treeattn_dtype_t(7);
/// int8, 1 byte. Keys and values; the values are those of `k_scale` and `v_scale` times these whole numbers, and a step without
/// these scales is refused. Since 0.2.
pub const TREEATTN_DTYPE_INT8: treeattn_dtype_t = treeattn_dtype_t(8);
/// ggml blocks of 32 values, 20 bytes: f16 d, f16 m and 32 times 4 bits q, value d * q + m. Keys and values. Since 0.2.
pub const TREEATTN_DTYPE_Q4_1: treeattn_dtype_t = treeattn_dtype_t(9);
/// ggml blocks of 32 values, 22 bytes: f16 d, 32 times the fifth bit, 32 times 4 bits, value d * (q - 16). Keys and values.
/// Since 0.2.
pub const TREEATTN_DTYPE_Q5_0: treeattn_dtype_t = treeattn_dtype_t(10);
/// ggml blocks of 32 values, 24 bytes: f16 d, f16 m, 32 times the fifth bit, 32 times 4 bits, value d * q + m. Keys and values.
/// Since 0.2.
pub const TREEATTN_DTYPE_Q5_1: treeattn_dtype_t = treeattn_dtype_t(11);
/// ggml blocks of 32 values, 18 bytes: f16 d and 32 times 4 bits q, value `d * t[q]` with ggml's table t of 16 whole numbers.
/// Keys and values. Since 0.2.
pub const TREEATTN_DTYPE_IQ4_NL: treeattn_dtype_t = treeattn_dtype_t(12);

/// How keys and values are laid out in memory.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_kv_layout_t(pub i32);

/// Tensors [sequence, token, kv head, dim] with any byte strides. The default.
pub const TREEATTN_KV_LAYOUT_STRIDED: treeattn_kv_layout_t = treeattn_kv_layout_t(0);
/// Pages [page, slot, kv head, dim] named by a table int32 [batch, max_pages], as in vLLM.
pub const TREEATTN_KV_LAYOUT_BLOCK_TABLE: treeattn_kv_layout_t = treeattn_kv_layout_t(1);
/// Pages [page, slot, kv head, dim] named by compressed rows (indptr, indices, last_page_len), as in FlashInfer.
pub const TREEATTN_KV_LAYOUT_CSR_PAGES: treeattn_kv_layout_t = treeattn_kv_layout_t(2);

/// Which rank holds which token.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_placement_kind_t(pub i32);

/// Each rank holds one run of consecutive tokens; where it begins comes with each step (`kv_start`). The default.
pub const TREEATTN_PLACEMENT_CONTIGUOUS: treeattn_placement_kind_t = treeattn_placement_kind_t(0);
/// Runs of `interleave` tokens go to the ranks in turn; 1 is round robin.
pub const TREEATTN_PLACEMENT_INTERLEAVED: treeattn_placement_kind_t = treeattn_placement_kind_t(1);
/// Every local slot carries its own global position (`kv_position`).
pub const TREEATTN_PLACEMENT_EXPLICIT: treeattn_placement_kind_t = treeattn_placement_kind_t(2);

/// Who gets the merged output.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_output_t(pub i32);

/// Every rank, all heads, the same bits. The default.
pub const TREEATTN_OUTPUT_REPLICATED: treeattn_output_t = treeattn_output_t(0);
/// Each rank, its own heads only (see `treeattn_head_range`): for a tensor-parallel output projection.
pub const TREEATTN_OUTPUT_SCATTERED: treeattn_output_t = treeattn_output_t(1);
/// No exchange: each rank gets the output over its own shard.
pub const TREEATTN_OUTPUT_LOCAL: treeattn_output_t = treeattn_output_t(2);
/// Each rank, its own part of every row, all heads: its shard's output times exp(own lse - merged lse). The parts of all ranks add
/// up to the output, as they do in an engine's all-reduce after the output projection; the lse is the merged one, the same bits on
/// every rank. Between ranks travel 8 bytes a row and head, whatever `wire_dtype`. With TREEATTN_ALGORITHM_AUTO or
/// TREEATTN_ALGORITHM_ONE_SHOT; on CPUs, and on GPUs that write into each other's memory. Since 0.2.
pub const TREEATTN_OUTPUT_WEIGHTED: treeattn_output_t = treeattn_output_t(3);

/// What each rank passes as q.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_query_input_t(pub i32);

/// All heads on every rank. The default.
pub const TREEATTN_QUERY_INPUT_REPLICATED: treeattn_query_input_t = treeattn_query_input_t(0);
/// Each rank its own heads (see `treeattn_head_range`), as a tensor-parallel projection leaves them: a step begins with an exchange
/// that brings every rank those of all heads, a rank without keys or heads included, under the step's deadline. The outputs have
/// the bits that they have with all heads on every rank. Not with TREEATTN_OUTPUT_LOCAL, nor on GPUs with
/// TREEATTN_ALGORITHM_ALLREDUCE3 or over several nodes. `treeattn_plan_partial`, which exchanges nothing, takes all heads.
/// Since 0.2.
pub const TREEATTN_QUERY_INPUT_SCATTERED: treeattn_query_input_t = treeattn_query_input_t(1);

/// How partials meet. All are exact.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_algorithm_t(pub i32);

/// The library chooses; `treeattn_plan_stats` says which and why. The default.
pub const TREEATTN_ALGORITHM_AUTO: treeattn_algorithm_t = treeattn_algorithm_t(0);
/// Every rank sends its partial to every rank, each merges all, in one step. GPUs that cannot reach each other's memory do so
/// by one allgather of NCCL, which takes each GPU once; once a step has failed, graphs that were captured from it must not be
/// replayed.
pub const TREEATTN_ALGORITHM_ONE_SHOT: treeattn_algorithm_t = treeattn_algorithm_t(1);
/// Each rank merges its own heads of all partials, then sends the merged heads to all.
pub const TREEATTN_ALGORITHM_TWO_SHOT: treeattn_algorithm_t = treeattn_algorithm_t(2);
/// A tree over nodes (see `node_group`): within each node first, then between them, then back. On CPUs between nodes by recursive
/// doubling; needs the transport's `sendrecv`. On GPUs through the memory of a node's GPUs first, then by one allgather of NCCL
/// among ranks of different nodes, whose GPUs differ, too; of one node there is none. There what ONE_SHOT says of failed steps
/// holds, too.
pub const TREEATTN_ALGORITHM_TREE: treeattn_algorithm_t = treeattn_algorithm_t(3);
/// The paper's three reductions (a maximum, two sums): a baseline. GPUs make them over NCCL, which takes each GPU once; once
/// a step has failed, graphs that were captured from it must not be replayed.
pub const TREEATTN_ALGORITHM_ALLREDUCE3: treeattn_algorithm_t = treeattn_algorithm_t(4);
/// Keys and values are passed from rank to rank: a baseline. Needs the transport's `sendrecv`.
pub const TREEATTN_ALGORITHM_RING: treeattn_algorithm_t = treeattn_algorithm_t(5);

/// Which bits are promised to be the same.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_reproducibility_t(pub i32);

/// Same plan, same inputs: same bits, every run, on every rank. The default.
pub const TREEATTN_REPRODUCIBILITY_REPEATABLE: treeattn_reproducibility_t = treeattn_reproducibility_t(0);
/// A row's bits do not depend on its neighbours in the batch. No plan serves it yet: TREEATTN_ERROR_UNSUPPORTED.
pub const TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT: treeattn_reproducibility_t = treeattn_reproducibility_t(1);
/// The same bits for any number of ranks. No plan serves it yet: TREEATTN_ERROR_UNSUPPORTED.
pub const TREEATTN_REPRODUCIBILITY_CANONICAL: treeattn_reproducibility_t = treeattn_reproducibility_t(2);

/// What an additional mask holds.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct treeattn_mask_kind_t(pub i32);

/// No mask. The default.
pub const TREEATTN_MASK_NONE: treeattn_mask_kind_t = treeattn_mask_kind_t(0);
/// Added to the scaled scores; -inf hides.
pub const TREEATTN_MASK_ADDITIVE: treeattn_mask_kind_t = treeattn_mask_kind_t(1);
/// Bytes; non-zero is visible.
pub const TREEATTN_MASK_BOOLEAN: treeattn_mask_kind_t = treeattn_mask_kind_t(2);

/// Flag of `treeattn_attention_desc_t`: keys and values older than the step's own tokens do not change while earlier
/// work of the stream runs, so that a step may read them early.
pub const TREEATTN_ATTENTION_KV_STABLE: u32 = 1;
/// Flag of `treeattn_attention_desc_t`: every step that exchanges compares what the ranks passed: the queries bit by bit (by
/// a 64-bit sum), query tokens and their positions, `global_length`, and that the keys of all ranks together are the positions
/// 0 to `global_length` - 1, each once (with explicit placement by their number and the sums of their first three powers).
/// Ranks that do not fit together get TREEATTN_ERROR_MISMATCH, which names argument and sequence, and the rank at which
/// it shows: one that differs from most, or one whose keys begin where others end or do not (with explicit placement none for
/// positions that are held twice or by no rank); the outputs of that sequence are
/// NaN on every rank, the others are good, and the communicator stays usable. Keys at or beyond `global_length` do not fit
/// either, but with TREEATTN_ATTENTION_SURPLUS_KEYS: there those that `query_position` lets a query see have to be held once, too,
/// and the others do not count (with explicit placement none do, since nodes of a tree of drafts may share a position). Such
/// plans need `global_length`, and `kv_start` or `kv_position` where their placement has one, also where they are not causal.
/// Sinks, slopes, mask factors, masks and scales are not compared. Merges of partials and `treeattn_plan_partial` check nothing,
/// and neither do plans that exchange nothing. On CPUs the step returns the error, or the
/// stream does; on GPUs it is told as TREEATTN_ERROR_INVALID_DATA is, by `treeattn_comm_status`, once, and a captured step checks
/// in every replay. Not on GPUs whose steps go over NCCL (TREEATTN_ERROR_UNSUPPORTED). Since 0.2.
pub const TREEATTN_ATTENTION_CHECKED: u32 = 2;
/// Flag of `treeattn_attention_desc_t`, with `causal` = 1: sequences may hold keys past `global_length`, such as those of
/// drafts that were rolled back; causality hides them from all queries at positions below it, which are all but those that
/// `query_position` puts elsewhere. Without it such a step is refused on CPUs, where it may be that a rank's lengths are
/// stale, but with explicit placement, whose positions only CHECKED plans hold against `global_length`. Since 0.2.
pub const TREEATTN_ATTENTION_SURPLUS_KEYS: u32 = 4;

/// Flag of `treeattn_attention_desc_t`, with CSR pages: each kv head has lists of pages of its own, as where heads select the
/// keys that they attend (with `page_size` = 1: lists of keys). See `page_index_head_stride` of `treeattn_decode_args_t`. Not with
/// TREEATTN_ATTENTION_CHECKED. Since 0.2.
pub const TREEATTN_ATTENTION_PAGES_BY_HEAD: u32 = 8;

/// Flag of `treeattn_merge_args_t`: an incoming lse of +inf means an empty partial, as -inf does.
pub const TREEATTN_MERGE_PLUS_INF_IS_EMPTY: u32 = 1;

/// Flag of `treeattn_merge_args_t`: an incoming lse that is NaN means an empty partial, as -inf does. Since 0.2.
pub const TREEATTN_MERGE_NAN_IS_EMPTY: u32 = 2;

/// Version of the header, to compare with `treeattn_version`.
pub const TREEATTN_VERSION_MAJOR: i32 = 0;
/// See `TREEATTN_VERSION_MAJOR`.
pub const TREEATTN_VERSION_MINOR: i32 = 2;
/// See `TREEATTN_VERSION_MAJOR`.
pub const TREEATTN_VERSION_PATCH: i32 = 0;
/// Version of the binary interface, to compare with `treeattn_abi_version`. It grows when something is added;
/// nothing is taken away within one soname.
pub const TREEATTN_ABI_VERSION: i32 = 2;

/// Flag of `treeattn_transport_t`: callbacks may also come from the threads of CPU streams, so that steps of this
/// communicator may be enqueued. Without it a step with a stream is refused.
pub const TREEATTN_TRANSPORT_STREAM_THREADS: u32 = 1;

/// Flag of `treeattn_executor_t`: the tasks of a call run at the same time, each on a thread of its own, so that they may wait
/// for each other. Without it the library never makes them wait; this version never does. Since 0.2.
pub const TREEATTN_EXECUTOR_CONCURRENT: u32 = 1;
