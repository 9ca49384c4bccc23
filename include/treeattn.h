/*
 * libtreeattn: exact decode attention over a KV cache that is sharded along the sequence.
 *
 * Generated from src/ffi by cbindgen; do not edit. SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What it does. An engine holds a KV cache that is too large or too slow for one device, split along the sequence over
 * ranks. For each decode step every rank passes the queries and its own shard of keys and values; every rank gets back
 * the exact attention output. A rank turns its shard into a partial, (output, log-sum-exp), and partials meet by an
 * associative merge, in a tree (Tree Attention, arXiv 2408.04093; also: decode context parallelism). It is not the tree
 * mask of speculative decoding.
 *
 * Objects. A runtime is a process's use of the library. A communicator is one rank's end of a group of ranks. A plan is
 * an attention shape made ready on one rank: it allocates once, and serves every layer of that shape. A stream is an
 * in-order queue of steps. Buffers are a convenience. Handles are opaque and never addresses: a destroyed, foreign or
 * wrong-typed handle is always TREEATTN_ERROR_BAD_HANDLE. Destroying NULL is fine. Parents may go first; their children
 * then return TREEATTN_ERROR_PARENT_DESTROYED and can still be destroyed.
 *
 * A step, on each rank:
 *
 *   treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;    // then q_heads, kv_heads, dims, dtypes, limits
 *   treeattn_plan_create(comm, &desc, &plan);                         // once; collective
 *   treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;          // then batch, q, k, v, out, kv_length, ...
 *   treeattn_plan_decode(plan, &args, stream);                        // every layer, every step
 *   treeattn_stream_synchronize(stream);
 *
 * Structs. struct_size comes first: start from the TREEATTN_..._INIT value of the struct. Zero means default in every
 * other field. A program compiled with an older, shorter struct works; a longer one works where its new fields are zero.
 * treeattn_tensor_t and treeattn_placement_t are frozen and have no struct_size. Strides are in bytes.
 *
 * Errors. Every function but the string and version getters returns treeattn_status_t. Outputs come last and are
 * untouched on error. treeattn_last_error_message() names the argument, the value found and the value wanted. The library
 * never aborts, traps, or waits without a deadline; it opens no sockets, installs no signal handlers and prints nothing.
 *
 * Pointers. Each must be NULL or valid for what its parameter says. Tensors and index arrays of a step are the caller's,
 * in memory of the plan's device, valid and unchanged until the step is done; structs of arguments are copied at once.
 *
 * Threads. Calls that exchange on one communicator and its plans are serialised by the caller, and all ranks issue them in
 * the same order. treeattn_comm_abort(), treeattn_comm_status() and treeattn_last_error_message() may be called from any
 * thread at any time. Several ranks of one process need a thread or a stream each.
 */

#ifndef TREEATTN_H
#define TREEATTN_H

#include <stddef.h>
#include <stdint.h>
#if defined(_WIN32)
#error "libtreeattn supports Linux and other Unix systems"
#endif

/** A device of a kind: TREEATTN_DEVICE(TREEATTN_DEVICE_CUDA, 1). */
#define TREEATTN_DEVICE(kind, ordinal) ((treeattn_device_t)(((int32_t)(kind)) * 65536 + (int32_t)(ordinal)))
/** CPU device n; there is one, 0. */
#define TREEATTN_CPU(n) TREEATTN_DEVICE(TREEATTN_DEVICE_CPU, n)
/** CUDA device n, by the driver's ordinal. */
#define TREEATTN_CUDA(n) TREEATTN_DEVICE(TREEATTN_DEVICE_CUDA, n)

/*
 * Initial values: struct_size set, everything else 0. In C they are initialisers, in C++ values.
 */
#ifdef __cplusplus
namespace treeattn_detail {
template <typename T>
inline T sized() {
  T value = T();
  value.struct_size = sizeof(T);
  return value;
}
}  // namespace treeattn_detail
#define TREEATTN_INIT_(type) (treeattn_detail::sized<type>())
#else
#define TREEATTN_INIT_(type) { .struct_size = sizeof(type) }
#endif
#define TREEATTN_RUNTIME_CONFIG_INIT TREEATTN_INIT_(treeattn_runtime_config_t)
#define TREEATTN_DEVICE_INFO_INIT TREEATTN_INIT_(treeattn_device_info_t)
#define TREEATTN_COMM_CONFIG_INIT TREEATTN_INIT_(treeattn_comm_config_t)
#define TREEATTN_COMM_STATUS_INIT TREEATTN_INIT_(treeattn_comm_status_t)
#define TREEATTN_ATTENTION_DESC_INIT TREEATTN_INIT_(treeattn_attention_desc_t)
#define TREEATTN_DECODE_ARGS_INIT TREEATTN_INIT_(treeattn_decode_args_t)
#define TREEATTN_MERGE_ARGS_INIT TREEATTN_INIT_(treeattn_merge_args_t)
#define TREEATTN_PLAN_MEMORY_INIT TREEATTN_INIT_(treeattn_plan_memory_t)
#define TREEATTN_PLAN_STATS_INIT TREEATTN_INIT_(treeattn_plan_stats_t)
#define TREEATTN_SELFCHECK_CONFIG_INIT TREEATTN_INIT_(treeattn_selfcheck_config_t)
#define TREEATTN_SELFCHECK_REPORT_INIT TREEATTN_INIT_(treeattn_selfcheck_report_t)


/**
 * Flag of `treeattn_attention_desc_t`: keys and values older than the step's own tokens do not change while earlier
 * work of the stream runs, so that a step may read them early.
 */
#define TREEATTN_ATTENTION_KV_STABLE 1

/**
 * Flag of `treeattn_merge_args_t`: an incoming lse of +inf means an empty partial, as -inf does.
 */
#define TREEATTN_MERGE_PLUS_INF_IS_EMPTY 1

/**
 * Version of the header, to compare with `treeattn_version`.
 */
#define TREEATTN_VERSION_MAJOR 0

/**
 * See `TREEATTN_VERSION_MAJOR`.
 */
#define TREEATTN_VERSION_MINOR 1

/**
 * See `TREEATTN_VERSION_MAJOR`.
 */
#define TREEATTN_VERSION_PATCH 0

/**
 * Version of the binary interface, to compare with `treeattn_abi_version`. It grows when something is added;
 * nothing is taken away within one soname.
 */
#define TREEATTN_ABI_VERSION 1

/**
 * Memory of a device, a convenience. Made by `treeattn_buffer_alloc`.
 */
typedef struct treeattn_buffer_t treeattn_buffer_t;

/**
 * One rank's end of a communicator. Made by `treeattn_comm_create_local`.
 */
typedef struct treeattn_comm_t treeattn_comm_t;

/**
 * A shape made ready on one rank. Made by `treeattn_plan_create`.
 */
typedef struct treeattn_plan_t treeattn_plan_t;

/**
 * A process's use of the library. Made by `treeattn_runtime_create`.
 */
typedef struct treeattn_runtime_t treeattn_runtime_t;

/**
 * An in-order queue of steps on one device. Made by `treeattn_stream_create`.
 */
typedef struct treeattn_stream_t treeattn_stream_t;

/**
 * Outcome of a call: `TREEATTN_OK` or a positive `TREEATTN_ERROR_` code.
 */
typedef int32_t treeattn_status_t;

/**
 * What `treeattn_runtime_create` takes.
 */
typedef struct {
  /**
   * sizeof(treeattn_runtime_config_t).
   */
  size_t struct_size;
  /**
   * Instruction set of the CPU backend: "scalar", "avx2", "avx512" or "neon". NULL: the environment variable
   * TREEATTN_CPU_ISA, else the best that the machine has.
   */
  const char *cpu_isa;
} treeattn_runtime_config_t;

/**
 * What kind of device.
 */
typedef int32_t treeattn_device_kind_t;

/**
 * A device: kind * 65536 + ordinal. Make it with `TREEATTN_CPU(n)`, `TREEATTN_CUDA(n)` or `TREEATTN_DEVICE(kind, n)`.
 */
typedef int32_t treeattn_device_t;

/**
 * What a device is. Filled by `treeattn_runtime_device_info`.
 */
typedef struct {
  /**
   * sizeof(treeattn_device_info_t).
   */
  size_t struct_size;
  /**
   * The device.
   */
  treeattn_device_t device;
  /**
   * Processor cores that this process may use, or streaming multiprocessors.
   */
  int32_t units;
  /**
   * Its memory in bytes.
   */
  uint64_t memory;
  /**
   * Its maker's name for it; cut where it is longer.
   */
  char name[128];
  /**
   * The instruction set in use, and why where it was asked for; or the compute capability. Cut where it is longer.
   */
  char isa[256];
} treeattn_device_info_t;

/**
 * How weighty a log line is.
 */
typedef int32_t treeattn_log_level_t;

/**
 * Receives log lines. Called from any thread, also the library's own, with a text that is valid during the call; must
 * not call the library, unwind or jump out.
 */
typedef void (*treeattn_log_callback_t)(treeattn_log_level_t level, const char *message, void *user_data);

/**
 * How a communicator waits and what it may use. The same on every rank.
 */
typedef struct {
  /**
   * sizeof(treeattn_comm_config_t).
   */
  size_t struct_size;
  /**
   * How long creating the communicator and its plans may wait for the other ranks, in nanoseconds. 0: 30 s.
   */
  int64_t setup_timeout;
  /**
   * How long a step may wait for the other ranks, in nanoseconds. 0: 10 s.
   */
  int64_t step_timeout;
  /**
   * Worker threads of a CPU rank, the calling thread among them. 0: the cores over the local ranks, at least 1.
   */
  int32_t threads_per_rank;
  /**
   * Ranks of the same group count as one node.
   */
  int32_t node_group;
  /**
   * Path of the NCCL library to load. NULL: looked for.
   */
  const char *nccl_path;
} treeattn_comm_config_t;

/**
 * The health of a communicator. Filled by `treeattn_comm_status`.
 */
typedef struct {
  /**
   * sizeof(treeattn_comm_status_t).
   */
  size_t struct_size;
  /**
   * TREEATTN_OK, why the communicator is broken, or TREEATTN_ERROR_INVALID_DATA of a step.
   */
  treeattn_status_t code;
  /**
   * The rank that the error is about, -1 if none.
   */
  int32_t rank;
  /**
   * Exchange steps that this rank completed.
   */
  uint64_t step;
  /**
   * The plan of the last step by its number on the communicator (from 1; see `treeattn_plan_stats_t`), 0 before the
   * first; with INVALID_DATA the plan that met it.
   */
  uint64_t plan;
  /**
   * The first sequence that bad data was found in, -1 if none.
   */
  int32_t sequence;
  /**
   * 1: no exchange will succeed any more; destroy the communicator and make a new one.
   */
  int32_t broken;
  /**
   * The message that goes with `code`; empty if there is none, cut where it is longer.
   */
  char message[512];
} treeattn_comm_status_t;

/**
 * Element type of a tensor. 0 is no type: where a field has a default, 0 selects it, elsewhere it is refused.
 */
typedef int32_t treeattn_dtype_t;

/**
 * How keys and values are laid out in memory.
 */
typedef int32_t treeattn_kv_layout_t;

/**
 * Which rank holds which token.
 */
typedef int32_t treeattn_placement_kind_t;

/**
 * Which rank holds which token. Frozen: no struct_size.
 */
typedef struct {
  /**
   * The kind.
   */
  treeattn_placement_kind_t kind;
  /**
   * Tokens a run with TREEATTN_PLACEMENT_INTERLEAVED, at least 1; else 0.
   */
  int32_t interleave;
} treeattn_placement_t;

/**
 * What an additional mask holds.
 */
typedef int32_t treeattn_mask_kind_t;

/**
 * What each rank passes as q.
 */
typedef int32_t treeattn_query_input_t;

/**
 * Who gets the merged output.
 */
typedef int32_t treeattn_output_t;

/**
 * How partials meet. All are exact.
 */
typedef int32_t treeattn_algorithm_t;

/**
 * Which bits are promised to be the same.
 */
typedef int32_t treeattn_reproducibility_t;

/**
 * An attention shape: what stays the same from step to step, and is the same on every rank.
 *
 * `kv_heads` = 0 describes a merge-only plan: the engine makes the partials, and only `q_heads`, `head_dim_v`,
 * `max_query_tokens`, `out_dtype`, `wire_dtype`, `output` and `algorithm` count. A field whose capability this build
 * lacks is TREEATTN_ERROR_UNSUPPORTED, by name.
 */
typedef struct {
  /**
   * sizeof(treeattn_attention_desc_t).
   */
  size_t struct_size;
  /**
   * Query heads, at least 1.
   */
  int32_t q_heads;
  /**
   * Key and value heads, a divisor of `q_heads`. 0: a merge-only plan.
   */
  int32_t kv_heads;
  /**
   * Dimension of q and k, 1 to 1024.
   */
  int32_t head_dim_qk;
  /**
   * Dimension of v and of the output, 1 to 1024. May differ from `head_dim_qk`.
   */
  int32_t head_dim_v;
  /**
   * Element type of q: f32, f16 or bf16.
   */
  treeattn_dtype_t q_dtype;
  /**
   * Element type of k.
   */
  treeattn_dtype_t k_dtype;
  /**
   * Element type of v.
   */
  treeattn_dtype_t v_dtype;
  /**
   * Element type of the output: f32, f16 or bf16.
   */
  treeattn_dtype_t out_dtype;
  /**
   * Layout of k and v.
   */
  treeattn_kv_layout_t kv_layout;
  /**
   * Tokens a page, at least 1; 0 for the strided layout.
   */
  int32_t page_size;
  /**
   * Which rank holds which token.
   */
  treeattn_placement_t placement;
  /**
   * Most sequences in a step, at least 1.
   */
  int32_t max_batch;
  /**
   * Most query tokens in a step, all sequences together, at least 1.
   */
  int32_t max_query_tokens;
  /**
   * Most tokens of one sequence on one rank, at least 1. Costs no memory.
   */
  int32_t max_kv_length;
  /**
   * Multiplies q.k; 0: 1/sqrt(head_dim_qk).
   */
  float scale;
  /**
   * 1: a query does not see keys at later global positions. Its own token is a key like the others: put it into the
   * cache first.
   */
  int32_t causal;
  /**
   * Sliding window: keys visible to a query, by global position, its own included. 0: all.
   */
  int32_t window;
  /**
   * Scores become softcap * tanh(score / softcap). 0: off.
   */
  float softcap;
  /**
   * 1: per-head slopes times the global distance are subtracted from the scores (`alibi_slopes`).
   */
  int32_t alibi;
  /**
   * 1: per-head sinks join the softmax denominator, once and not per rank (`sinks`).
   */
  int32_t sinks;
  /**
   * An additional mask.
   */
  treeattn_mask_kind_t mask;
  /**
   * Element type of an additive mask; 0 with none and with a boolean one.
   */
  treeattn_dtype_t mask_dtype;
  /**
   * What each rank passes as q.
   */
  treeattn_query_input_t query_input;
  /**
   * Who gets the merged output.
   */
  treeattn_output_t output;
  /**
   * How partials meet.
   */
  treeattn_algorithm_t algorithm;
  /**
   * Which bits are promised to be the same.
   */
  treeattn_reproducibility_t reproducibility;
  /**
   * Element type of partial outputs on their way between ranks: f32, f16 or bf16. 0: f32. The lse always travels as
   * f32.
   */
  treeattn_dtype_t wire_dtype;
  /**
   * TREEATTN_ATTENTION_ flags.
   */
  uint32_t flags;
  /**
   * Zero; keeps the size a multiple of 8.
   */
  uint32_t reserved;
} treeattn_attention_desc_t;

/**
 * A caller's buffer with byte strides; what the dimensions are is said where the tensor is used. Frozen: no
 * struct_size.
 *
 * All strides zero means packed, row-major. Otherwise every stride is taken as it is, so that a zero broadcasts
 * (inputs only). The library touches nothing outside `bytes` bytes from `data`.
 */
typedef struct {
  /**
   * First element, on the plan's device. Aligned to the element (to 4 bytes at most).
   */
  void *data;
  /**
   * Bytes from `data` that the library may touch.
   */
  uint64_t bytes;
  /**
   * Byte strides, outermost dimension first; those past the last dimension are ignored.
   */
  int64_t stride[4];
} treeattn_tensor_t;

/**
 * The arguments of one decode step on one rank. Pointers are to memory of the plan's device.
 *
 * Lengths, starts, positions and tables are read while the step runs, and checked there before any address is formed
 * from them: what is out of range gives NaN for that sequence and TREEATTN_ERROR_INVALID_DATA. A row with no queries
 * or no keys is valid padding.
 */
typedef struct {
  /**
   * sizeof(treeattn_decode_args_t).
   */
  size_t struct_size;
  /**
   * Sequences in this step, 0 to `max_batch`.
   */
  int32_t batch;
  /**
   * Query tokens of all sequences together, 0 to `max_query_tokens`: an upper bound of `query_start[batch]`.
   */
  int32_t query_tokens;
  /**
   * Queries [token, query head, dim].
   */
  treeattn_tensor_t q;
  /**
   * Keys [sequence, token, kv head, dim], or [page, slot, kv head, dim].
   */
  treeattn_tensor_t k;
  /**
   * Values, as the keys. May be a view of the keys.
   */
  treeattn_tensor_t v;
  /**
   * Output [token, query head, dim]; with a scattered output the rank's own heads only. Shares no byte with inputs.
   */
  treeattn_tensor_t out;
  /**
   * Natural log-sum-exp of the scaled scores, f32 [token, query head], heads as `out`. data NULL: not wanted.
   */
  treeattn_tensor_t lse;
  /**
   * int32 [batch + 1]: first query token of each sequence, ascending from 0. NULL: query_tokens / batch tokens each.
   */
  const int32_t *query_start;
  /**
   * int32 [batch]: tokens of each sequence on this rank, 0 to `max_kv_length`. NULL only for CSR pages with
   * `last_page_len`.
   */
  const int32_t *kv_length;
  /**
   * int32 [batch]: tokens of each sequence on all ranks together, this step's query tokens included. Required where
   * global positions matter (causal, window, ALiBi) and `query_position` is NULL.
   */
  const int32_t *global_length;
  /**
   * int32 [batch], contiguous placement: global position of local slot 0. NULL: 0, with one rank.
   */
  const int32_t *kv_start;
  /**
   * int32, explicit placement: global position of each local slot; row b begins at element b * kv_position_stride.
   */
  const int32_t *kv_position;
  /**
   * Elements between the rows of `kv_position`. 0: `max_kv_length`.
   */
  int64_t kv_position_stride;
  /**
   * int32 [query_tokens]: global position of each query token. NULL: the last of the sequence, in order.
   */
  const int32_t *query_position;
  /**
   * int32 [batch, max_pages], block table layout: the pages of each sequence. Entries past its length are not used.
   */
  const int32_t *block_table;
  /**
   * Entries of a row of `block_table`.
   */
  int32_t max_pages;
  /**
   * Pages that exist in k and v.
   */
  int32_t num_pages;
  /**
   * int32 [batch + 1], CSR pages: first entry of each sequence in `page_indices`.
   */
  const int32_t *page_indptr;
  /**
   * int32 [num_page_indices], CSR pages: the pages, sequence after sequence.
   */
  const int32_t *page_indices;
  /**
   * Entries of `page_indices`.
   */
  int64_t num_page_indices;
  /**
   * int32 [batch], CSR pages: tokens in each sequence's last page, 1 to page_size. NULL: `kv_length` counts.
   */
  const int32_t *last_page_len;
  /**
   * f32 scales of fp8 keys, [sequence or page, token or slot, kv head]. Here all strides zero is one scale for all.
   */
  treeattn_tensor_t k_scale;
  /**
   * f32 scales of fp8 values, as `k_scale`.
   */
  treeattn_tensor_t v_scale;
  /**
   * f32 [query head].
   */
  treeattn_tensor_t alibi_slopes;
  /**
   * f32 [query head]: logits that join the denominator.
   */
  treeattn_tensor_t sinks;
  /**
   * Mask [sequence, head, query, local slot] of `mask_dtype`. Strides are taken as they are: 0 broadcasts.
   */
  treeattn_tensor_t mask;
} treeattn_decode_args_t;

/**
 * Partials to merge and where the result goes.
 *
 * For `treeattn_merge_partials` o is [partial, token, head, dim] and lse [partial, token, head]; for
 * `treeattn_plan_merge` each rank passes its own partial, o [token, head, dim] and lse [token, head].
 */
typedef struct {
  /**
   * sizeof(treeattn_merge_args_t).
   */
  size_t struct_size;
  /**
   * Query tokens.
   */
  int32_t query_tokens;
  /**
   * Heads of the partials. 0: the plan's `q_heads`.
   */
  int32_t heads;
  /**
   * Elements of a row. 0: the plan's `head_dim_v`.
   */
  int32_t head_dim;
  /**
   * Element type of `o`: f32, f16 or bf16.
   */
  treeattn_dtype_t o_dtype;
  /**
   * Element type of `out`. 0: the plan's `out_dtype`; for `treeattn_merge_partials` that of `o`.
   */
  treeattn_dtype_t out_dtype;
  /**
   * Base of the incoming lse: 0 for e, or 2. The outgoing lse is always natural.
   */
  int32_t lse_base;
  /**
   * TREEATTN_MERGE_ flags.
   */
  uint32_t flags;
  /**
   * Zero; keeps what follows aligned.
   */
  uint32_t reserved;
  /**
   * Normalised outputs of the partials. A row whose lse says empty (-inf) is never read.
   */
  treeattn_tensor_t o;
  /**
   * Log-sum-exps of the partials, f32.
   */
  treeattn_tensor_t lse;
  /**
   * Merged output [token, head, dim]; with a scattered plan the rank's own heads. Shares no byte with inputs.
   */
  treeattn_tensor_t out;
  /**
   * Merged natural log-sum-exp, f32 [token, head]. data NULL: not wanted.
   */
  treeattn_tensor_t out_lse;
} treeattn_merge_args_t;

/**
 * Memory that a plan holds, in bytes. None of it depends on the length of the cache. Filled by
 * `treeattn_plan_memory`.
 */
typedef struct {
  /**
   * sizeof(treeattn_plan_memory_t).
   */
  size_t struct_size;
  /**
   * Scratch of the backend and this rank's partials.
   */
  uint64_t workspace;
  /**
   * This rank's window, shared by all plans of the communicator.
   */
  uint64_t window;
} treeattn_plan_memory_t;

/**
 * What a plan has done so far. Filled by `treeattn_plan_stats`.
 */
typedef struct {
  /**
   * sizeof(treeattn_plan_stats_t).
   */
  size_t struct_size;
  /**
   * The number of this plan on its communicator, from 1.
   */
  uint64_t plan;
  /**
   * Steps run.
   */
  uint64_t steps;
  /**
   * Exchange rounds; a step larger than the window takes several.
   */
  uint64_t rounds;
  /**
   * Messages sent to peers.
   */
  uint64_t messages;
  /**
   * Bytes of partials sent to peers, each peer counted.
   */
  uint64_t bytes_sent;
  /**
   * The most bytes held at once, workspace and window.
   */
  uint64_t peak_memory;
  /**
   * The exchange algorithm in use.
   */
  treeattn_algorithm_t algorithm;
  /**
   * Element type of partial outputs between ranks.
   */
  treeattn_dtype_t wire_dtype;
  /**
   * First head of this rank's merged output.
   */
  int32_t head_begin;
  /**
   * One past its last head.
   */
  int32_t head_end;
  /**
   * Why the algorithm was chosen; cut where it is longer.
   */
  char reason[256];
} treeattn_plan_stats_t;

/**
 * What a self-check runs. Zero means default.
 */
typedef struct {
  /**
   * sizeof(treeattn_selfcheck_config_t).
   */
  size_t struct_size;
  /**
   * Local ranks; 0: 2.
   */
  int32_t ranks;
  /**
   * Sequences; 0: 2.
   */
  int32_t batch;
  /**
   * Query tokens of each sequence; 0: 1.
   */
  int32_t query_tokens;
  /**
   * Tokens of each sequence on all ranks together; 0: 300.
   */
  int32_t kv_length;
  /**
   * Seed of the random inputs.
   */
  uint64_t seed;
} treeattn_selfcheck_config_t;

/**
 * What a self-check found. Output: set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(treeattn_selfcheck_report_t).
   */
  size_t struct_size;
  /**
   * Non-zero: every bound held.
   */
  int32_t passed;
  /**
   * Non-zero: all ranks and a second run gave the same bits.
   */
  int32_t same_bits;
  /**
   * Rows compared.
   */
  uint64_t rows;
  /**
   * Largest |error| of an output over its bound; at most 1 where the bound holds.
   */
  double max_error_ratio;
  /**
   * Largest |error| of an lse over its bound.
   */
  double max_lse_error_ratio;
  /**
   * Share of outputs that are the correctly rounded exact value.
   */
  double correctly_rounded;
  /**
   * ||error|| / ||exact|| over all outputs.
   */
  double relative_l2;
  /**
   * The finding in words; cut to fit, terminated.
   */
  char message[256];
} treeattn_selfcheck_report_t;

/**
 * The call did what it says.
 */
#define TREEATTN_OK 0

/**
 * An argument is outside what the call accepts.
 */
#define TREEATTN_ERROR_INVALID_ARGUMENT 1

/**
 * A handle is NULL, foreign, destroyed or of another type.
 */
#define TREEATTN_ERROR_BAD_HANDLE 2

/**
 * The object that this one was made from has been destroyed. Destroying this one still works.
 */
#define TREEATTN_ERROR_PARENT_DESTROYED 3

/**
 * A valid request for something that this build does not do; the message names the field.
 */
#define TREEATTN_ERROR_UNSUPPORTED 4

/**
 * A library or device that the request needs is not on this machine.
 */
#define TREEATTN_ERROR_UNAVAILABLE 5

/**
 * The ranks passed different descriptors to a collective creation; the message names the field and the ranks.
 */
#define TREEATTN_ERROR_MISMATCH 6

/**
 * The ranks issued different exchanging calls. The communicator is broken.
 */
#define TREEATTN_ERROR_DESYNC 7

/**
 * A rank did not come before the deadline. The communicator is broken (unless the wait was for a full stream).
 */
#define TREEATTN_ERROR_TIMEOUT 8

/**
 * A rank was seen to leave. The communicator is broken.
 */
#define TREEATTN_ERROR_PEER_LOST 9

/**
 * The communicator was aborted. It is broken.
 */
#define TREEATTN_ERROR_ABORTED 10

/**
 * A length, position or table entry read during the step is out of range. The outputs of that sequence are NaN on
 * every rank, all others are good, and the communicator stays usable.
 */
#define TREEATTN_ERROR_INVALID_DATA 11

/**
 * Host memory could not be had.
 */
#define TREEATTN_ERROR_NO_MEMORY 12

/**
 * Device memory could not be had.
 */
#define TREEATTN_ERROR_NO_DEVICE_MEMORY 13

/**
 * The call cannot be made while a stream is being captured; the capture is intact.
 */
#define TREEATTN_ERROR_CAPTURING 14

/**
 * A CUDA call failed.
 */
#define TREEATTN_ERROR_CUDA 15

/**
 * The CUDA context is lost; only destroy calls still work on its objects.
 */
#define TREEATTN_ERROR_CUDA_FATAL 16

/**
 * An asynchronous CUDA error was pending before the call.
 */
#define TREEATTN_ERROR_CUDA_PRIOR 17

/**
 * An NCCL call failed.
 */
#define TREEATTN_ERROR_NCCL 18

/**
 * A callback of the engine's transport failed.
 */
#define TREEATTN_ERROR_TRANSPORT 19

/**
 * The operating system refused something (a thread, a file).
 */
#define TREEATTN_ERROR_SYSTEM 20

/**
 * A defect of the library, caught at its border. The process goes on; please report it.
 */
#define TREEATTN_ERROR_INTERNAL 21

/**
 * The object is in use by another call that must end first.
 */
#define TREEATTN_ERROR_BUSY 22

/**
 * The processors of this machine, together one device with ordinal 0.
 */
#define TREEATTN_DEVICE_CPU 0

/**
 * A CUDA GPU, by the driver's ordinal.
 */
#define TREEATTN_DEVICE_CUDA 1

/**
 * Something failed.
 */
#define TREEATTN_LOG_ERROR 1

/**
 * Something works, but not as asked.
 */
#define TREEATTN_LOG_WARNING 2

/**
 * A choice that the library made.
 */
#define TREEATTN_LOG_INFO 3

/**
 * IEEE binary32, 4 bytes.
 */
#define TREEATTN_DTYPE_F32 1

/**
 * IEEE binary16, 2 bytes.
 */
#define TREEATTN_DTYPE_F16 2

/**
 * bfloat16, 2 bytes.
 */
#define TREEATTN_DTYPE_BF16 3

/**
 * OCP fp8 with 4 exponent bits and no infinities, 1 byte. Keys and values.
 */
#define TREEATTN_DTYPE_F8_E4M3 4

/**
 * OCP fp8 with 5 exponent bits, 1 byte. Keys and values.
 */
#define TREEATTN_DTYPE_F8_E5M2 5

/**
 * ggml blocks of 32 values: an f16 scale and 32 int8, 34 bytes. Keys and values.
 */
#define TREEATTN_DTYPE_Q8_0 6

/**
 * ggml blocks of 32 values: an f16 scale and 32 times 4 bits, 18 bytes. Keys and values.
 */
#define TREEATTN_DTYPE_Q4_0 7

/**
 * Tensors [sequence, token, kv head, dim] with any byte strides. The default.
 */
#define TREEATTN_KV_LAYOUT_STRIDED 0

/**
 * Pages [page, slot, kv head, dim] named by a table int32 [batch, max_pages], as in vLLM.
 */
#define TREEATTN_KV_LAYOUT_BLOCK_TABLE 1

/**
 * Pages [page, slot, kv head, dim] named by compressed rows (indptr, indices, last_page_len), as in FlashInfer.
 */
#define TREEATTN_KV_LAYOUT_CSR_PAGES 2

/**
 * Each rank holds one run of consecutive tokens; where it begins comes with each step (`kv_start`). The default.
 */
#define TREEATTN_PLACEMENT_CONTIGUOUS 0

/**
 * Runs of `interleave` tokens go to the ranks in turn; 1 is round robin.
 */
#define TREEATTN_PLACEMENT_INTERLEAVED 1

/**
 * Every local slot carries its own global position (`kv_position`).
 */
#define TREEATTN_PLACEMENT_EXPLICIT 2

/**
 * Every rank, all heads, the same bits. The default.
 */
#define TREEATTN_OUTPUT_REPLICATED 0

/**
 * Each rank, its own heads only (see `treeattn_head_range`): for a tensor-parallel output projection.
 */
#define TREEATTN_OUTPUT_SCATTERED 1

/**
 * No exchange: each rank gets the output over its own shard.
 */
#define TREEATTN_OUTPUT_LOCAL 2

/**
 * All heads on every rank. The default.
 */
#define TREEATTN_QUERY_INPUT_REPLICATED 0

/**
 * Each rank its own heads (see `treeattn_head_range`).
 */
#define TREEATTN_QUERY_INPUT_SCATTERED 1

/**
 * The library chooses; `treeattn_plan_stats` says which and why. The default.
 */
#define TREEATTN_ALGORITHM_AUTO 0

/**
 * Every rank sends its partial to every rank, each merges all, in one step.
 */
#define TREEATTN_ALGORITHM_ONE_SHOT 1

/**
 * Each rank merges its own heads, then the merged heads are spread.
 */
#define TREEATTN_ALGORITHM_TWO_SHOT 2

/**
 * A tree over groups of ranks.
 */
#define TREEATTN_ALGORITHM_TREE 3

/**
 * The paper's three reductions (a maximum, two sums): a baseline.
 */
#define TREEATTN_ALGORITHM_ALLREDUCE3 4

/**
 * Keys and values passed round: a baseline.
 */
#define TREEATTN_ALGORITHM_RING 5

/**
 * Same plan, same inputs: same bits, every run, on every rank. The default.
 */
#define TREEATTN_REPRODUCIBILITY_REPEATABLE 0

/**
 * A row's bits do not depend on its neighbours in the batch.
 */
#define TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT 1

/**
 * The same bits for any number of ranks.
 */
#define TREEATTN_REPRODUCIBILITY_CANONICAL 2

/**
 * No mask. The default.
 */
#define TREEATTN_MASK_NONE 0

/**
 * Added to the scaled scores; -inf hides.
 */
#define TREEATTN_MASK_ADDITIVE 1

/**
 * Bytes; non-zero is visible.
 */
#define TREEATTN_MASK_BOOLEAN 2

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The library's version, "MAJOR.MINOR.PATCH". Compare with TREEATTN_VERSION_ of the header.
 *
 * **Returns** a static string; never NULL.
 * **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
 */
const char *treeattn_version(void);

/**
 * The library's TREEATTN_ABI_VERSION. An engine works with a library whose number is the one it was compiled with.
 *
 * **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
 */
int32_t treeattn_abi_version(void);

/**
 * The name of a status code, such as "INVALID_ARGUMENT"; "UNKNOWN" for any other number.
 *
 * **Returns** a static string; never NULL.
 * **Threads**: any. Never blocks. Capture-safe. **Since** 0.1.
 */
const char *treeattn_status_string(treeattn_status_t status);

/**
 * What the last failed call on this thread found and wanted: the function, the argument, both values.
 *
 * **Returns** a string of this thread, "" before its first failure; never NULL.
 * **Ownership**: the library's; valid until the next failed call on this thread, or the thread's end.
 * **Threads**: any; each has its own. Never blocks. Capture-safe. **Since** 0.1.
 */
const char *treeattn_last_error_message(void);

/**
 * Creates a runtime: a process's use of the library. Several may exist.
 *
 * @param config NULL for defaults.
 * @param runtime receives the handle.
 * @return OK; INVALID_ARGUMENT; UNAVAILABLE where the machine lacks the instruction set asked for.
 *
 * **Ownership**: the caller's, until treeattn_runtime_destroy().
 * **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_runtime_create(const treeattn_runtime_config_t *config, treeattn_runtime_t **runtime);

/**
 * Destroys a runtime. Objects made from it return PARENT_DESTROYED from now on and can still be destroyed.
 *
 * @param runtime NULL is fine.
 * @return OK; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_runtime_destroy(treeattn_runtime_t *runtime);

/**
 * How many devices of a kind there are. Without a driver there are 0 CUDA devices.
 *
 * @param count receives the number.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_runtime_device_count(treeattn_runtime_t *runtime,
                                                treeattn_device_kind_t kind,
                                                int32_t *count);

/**
 * What a device is.
 *
 * @param info set info->struct_size first.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE where there is no such device, naming the driver library.
 *
 * **Threads**: any. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_runtime_device_info(treeattn_runtime_t *runtime,
                                               treeattn_device_t device,
                                               treeattn_device_info_t *info);

/**
 * Sets who receives log lines; NULL for nobody. The library writes no output of its own.
 *
 * @param callback called from any thread, also during other calls; must not call the library nor unwind.
 * @param user_data passed on; must stay valid until the callback is replaced.
 * @return OK; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Blocks until calls of the former callback are over. **Since** 0.1.
 */
treeattn_status_t treeattn_runtime_set_log_callback(treeattn_runtime_t *runtime,
                                                    treeattn_log_callback_t callback,
                                                    void *user_data);

/**
 * Creates a stream: an in-order queue of steps on one device. On the CPU it has a thread of its own, and holds up to 1,024
 * steps before enqueueing waits for room.
 *
 * @param stream receives the handle.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE; SYSTEM where no thread could be started.
 *
 * **Ownership**: the caller's, until treeattn_stream_destroy().
 * **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_stream_create(treeattn_runtime_t *runtime,
                                         treeattn_device_t device,
                                         treeattn_stream_t **stream);

/**
 * Waits until everything enqueued so far is done, at most as long as its steps' deadlines allow.
 *
 * @return OK, or the first error of a step since the last call, which is then forgotten: TIMEOUT, DESYNC, PEER_LOST,
 * ABORTED, INVALID_DATA, INTERNAL; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_stream_synchronize(treeattn_stream_t *stream);

/**
 * Destroys a stream when its enqueued steps are done (each is bounded by its deadline).
 *
 * @param stream NULL is fine.
 * @return OK; BAD_HANDLE.
 *
 * **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_stream_destroy(treeattn_stream_t *stream);

/**
 * Allocates zeroed memory on a device, aligned to 64 bytes. A convenience: every call takes raw pointers.
 *
 * @param bytes at least 1.
 * @param buffer receives the handle.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; UNAVAILABLE; NO_MEMORY.
 *
 * **Ownership**: the caller's, until treeattn_buffer_destroy().
 * **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_buffer_alloc(treeattn_runtime_t *runtime,
                                        treeattn_device_t device,
                                        size_t bytes,
                                        treeattn_buffer_t **buffer);

/**
 * The address of a buffer's first byte, on its device.
 *
 * @param data receives the address; valid until the buffer is destroyed.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_buffer_data(treeattn_buffer_t *buffer, void **data);

/**
 * Copies host memory into a buffer, from byte `offset` on.
 *
 * @return OK; INVALID_ARGUMENT where the range leaves the buffer; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_buffer_upload(treeattn_buffer_t *buffer, size_t offset, const void *source, size_t bytes);

/**
 * Copies a buffer's bytes, from byte `offset` on, into host memory.
 *
 * @return OK; INVALID_ARGUMENT where the range leaves the buffer; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_buffer_download(treeattn_buffer_t *buffer, size_t offset, void *target, size_t bytes);

/**
 * Destroys a buffer. No step may use it any more.
 *
 * @param buffer NULL is fine.
 * @return OK; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_buffer_destroy(treeattn_buffer_t *buffer);

/**
 * Creates one communicator a device, all in this process: comms[r] is rank r. A device may appear several times.
 *
 * @param n ranks, at least 1.
 * @param devices [n], rank by rank.
 * @param config NULL for defaults.
 * @param comms [n], receives the handles; all of them or, on error, none.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED; UNAVAILABLE; UNSUPPORTED (a CUDA device in this
 * version); NO_MEMORY; SYSTEM.
 *
 * **Ownership**: the caller's, each until its treeattn_comm_destroy().
 * **Threads**: any. Blocks briefly. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_create_local(treeattn_runtime_t *runtime,
                                             int32_t n,
                                             const treeattn_device_t *devices,
                                             const treeattn_comm_config_t *config,
                                             treeattn_comm_t **comms);

/**
 * This rank, 0 to world - 1.
 *
 * @param rank receives it.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_rank(treeattn_comm_t *comm, int32_t *rank);

/**
 * The number of ranks.
 *
 * @param world receives it.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_world(treeattn_comm_t *comm, int32_t *world);

/**
 * Links, capacities and the algorithm table, as JSON.
 *
 * @param buf receives the text, cut to cap and terminated; NULL with cap = 0 to ask for the size.
 * @param needed receives the bytes of the whole text with its terminator; may be NULL where buf is not.
 * @return OK, also where the text was cut; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_describe(treeattn_comm_t *comm, char *buf, size_t cap, size_t *needed);

/**
 * The health of a communicator: whether it is broken and by whom, or which sequence of a step had bad data. Execution
 * errors of enqueued steps are found here. Reading takes a pending INVALID_DATA; a broken communicator stays broken.
 *
 * @param status set status->struct_size first.
 * @return OK where the status could be read (look at status->code); INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any, at any time. Never blocks nor synchronises. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_status(treeattn_comm_t *comm, treeattn_comm_status_t *status);

/**
 * Ends every wait on this communicator at once, on all ranks; they return ABORTED from now on.
 *
 * @return OK; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any, at any time. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_abort(treeattn_comm_t *comm);

/**
 * Destroys a communicator. Local, never collective: peers that still wait for this rank get PEER_LOST; its plans return
 * PARENT_DESTROYED and can still be destroyed.
 *
 * @param comm NULL is fine.
 * @return OK; BAD_HANDLE.
 *
 * **Threads**: any. Does not wait for peers. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_comm_destroy(treeattn_comm_t *comm);

/**
 * Whether a device serves a shape. Local: no communicator is needed.
 *
 * @return OK where it does; UNSUPPORTED naming the field that it does not serve; INVALID_ARGUMENT naming the field that
 * makes no sense; BAD_HANDLE; UNAVAILABLE.
 *
 * **Threads**: any. Does not block. **Since** 0.1.
 */
treeattn_status_t treeattn_attention_supported(treeattn_runtime_t *runtime,
                                               treeattn_device_t device,
                                               const treeattn_attention_desc_t *desc);

/**
 * Makes a shape ready on this rank: allocates everything that steps need. Collective: every rank of the communicator calls
 * it, local ranks from a thread each (or see treeattn_plan_create_all()).
 *
 * @param plan receives the handle.
 * @return OK; MISMATCH on every rank where descriptors differ, naming field and ranks; TIMEOUT where a rank does not
 * come before the setup deadline; INVALID_ARGUMENT; UNSUPPORTED naming the field; BAD_HANDLE; PARENT_DESTROYED; NO_MEMORY;
 * what broke the communicator.
 *
 * **Ownership**: the caller's, until treeattn_plan_destroy().
 * **Threads**: any, serialised with other calls on the communicator. Blocks until all ranks have come. Not during stream
 * capture. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_create(treeattn_comm_t *comm,
                                       const treeattn_attention_desc_t *desc,
                                       treeattn_plan_t **plan);

/**
 * treeattn_plan_create() for all ranks of a local group, from one thread.
 *
 * @param n the group's ranks.
 * @param comms [n], every rank of one group, once; plans[i] belongs to comms[i].
 * @param plans [n], receives the handles; all of them or, on error, none.
 * @return as treeattn_plan_create(), without TIMEOUT.
 *
 * **Ownership**: the caller's, each until its treeattn_plan_destroy().
 * **Threads**: any, serialised with other calls on the communicators. Blocks briefly. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_create_all(int32_t n,
                                           treeattn_comm_t *const *comms,
                                           const treeattn_attention_desc_t *desc,
                                           treeattn_plan_t **plans);

/**
 * One decode step on this rank: attends the shard, exchanges the partials with the other ranks, writes the merged output.
 * Allocates nothing. All ranks issue the exchanging calls of a communicator in the same order.
 *
 * @param stream enqueues there; NULL (CPU plans only) runs the step on the calling thread, so that every local rank then
 * needs a thread of its own.
 * @return enqueued: OK, INVALID_ARGUMENT, UNSUPPORTED, BAD_HANDLE, PARENT_DESTROYED, or what broke the communicator
 * before; nothing was written unless OK. What goes wrong in the step comes from treeattn_stream_synchronize() and
 * treeattn_comm_status(). With a NULL stream also: INVALID_DATA (outputs written, NaN for the sequence named), TIMEOUT,
 * DESYNC, PEER_LOST, ABORTED (outputs NaN).
 *
 * **Ownership**: the caller's buffers stay valid and unchanged until the step is done; `args` itself is copied.
 * **Threads**: any, serialised with other calls on the communicator. Enqueues; blocks with a NULL stream, and where a CPU
 * stream already holds 1,024 steps. Capture-safe on CUDA streams. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_decode(treeattn_plan_t *plan,
                                       const treeattn_decode_args_t *args,
                                       treeattn_stream_t *stream);

/**
 * This rank's partial alone: output and lse over its own shard, all heads, no exchange. Merge it with an own exchange, or
 * with treeattn_plan_merge() and treeattn_merge_partials().
 *
 * @param args out is [token, q head, dim] and lse [token, q head], whatever the plan's output mode.
 * @return as treeattn_plan_decode().
 *
 * **Ownership**, **Threads**: as treeattn_plan_decode(). **Since** 0.1.
 */
treeattn_status_t treeattn_plan_partial(treeattn_plan_t *plan,
                                        const treeattn_decode_args_t *args,
                                        treeattn_stream_t *stream);

/**
 * Exchanges and merges partials that the engine made with a kernel of its own: every rank passes its own partial. Any plan
 * serves; one with kv_heads = 0 does nothing else.
 *
 * @param args o is [token, head, dim], lse [token, head] in base e or 2.
 * @return as treeattn_plan_decode().
 *
 * **Ownership**, **Threads**: as treeattn_plan_decode(). **Since** 0.1.
 */
treeattn_status_t treeattn_plan_merge(treeattn_plan_t *plan,
                                      const treeattn_merge_args_t *args,
                                      treeattn_stream_t *stream);

/**
 * Memory that a plan holds; none of it depends on the length of the cache.
 *
 * @param memory set memory->struct_size first.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_memory(treeattn_plan_t *plan, treeattn_plan_memory_t *memory);

/**
 * What a plan has done so far: steps, rounds, messages, bytes, the algorithm and why.
 *
 * @param stats set stats->struct_size first.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_stats(treeattn_plan_t *plan, treeattn_plan_stats_t *stats);

/**
 * Destroys a plan. Waits until its enqueued steps are done, at most the communicator's step deadline.
 *
 * @param plan NULL is fine.
 * @return OK; BAD_HANDLE; TIMEOUT where steps were still enqueued (they run on and keep their memory; the handle is
 * dead all the same).
 *
 * **Threads**: any. Blocks. Not during stream capture. **Since** 0.1.
 */
treeattn_status_t treeattn_plan_destroy(treeattn_plan_t *plan);

/**
 * Merges n partials of one place, in order, into one: o [partial, token, head, dim], lse [partial, token, head].
 *
 * @param args heads and head_dim must be set.
 * @param n partials, at least 1.
 * @param stream enqueues there; NULL (CPU) runs on the calling thread.
 * @return OK; INVALID_ARGUMENT; BAD_HANDLE; PARENT_DESTROYED; UNAVAILABLE.
 *
 * **Ownership**: the caller's buffers stay valid and unchanged until the merge is done; `args` itself is copied.
 * **Threads**: any. Enqueues; blocks with a NULL stream. Capture-safe on CUDA streams. **Since** 0.1.
 */
treeattn_status_t treeattn_merge_partials(treeattn_runtime_t *runtime,
                                          treeattn_device_t device,
                                          const treeattn_merge_args_t *args,
                                          int32_t n,
                                          treeattn_stream_t *stream);

/**
 * The heads that a rank owns in a scattered output: floor(rank * heads / world) up to floor((rank + 1) * heads / world),
 * possibly none.
 *
 * @param first receives the first head.
 * @param count receives the number of heads.
 * @return OK; INVALID_ARGUMENT.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_head_range(int32_t heads,
                                      int32_t world,
                                      int32_t rank,
                                      int32_t *first,
                                      int32_t *count);

/**
 * The rank that holds global position `position` of a sequence of `global_length` tokens. Contiguous placement here means
 * the even split: rank r holds floor(r L / world) up to floor((r + 1) L / world).
 *
 * @param owner receives the rank.
 * @return OK; INVALID_ARGUMENT, also with explicit placement.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_placement_owner(const treeattn_placement_t *placement,
                                           int32_t world,
                                           int32_t global_length,
                                           int32_t position,
                                           int32_t *owner);

/**
 * How many tokens of a sequence of `global_length` tokens a rank holds. Note that the length of a sequence without its last
 * k tokens is not this one less k: ask again.
 *
 * @param length receives the number.
 * @return OK; INVALID_ARGUMENT, also with explicit placement.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_placement_local_length(const treeattn_placement_t *placement,
                                                  int32_t world,
                                                  int32_t rank,
                                                  int32_t global_length,
                                                  int32_t *length);

/**
 * The local slot in which the owner of `position` holds it.
 *
 * @param slot receives the slot.
 * @return OK; INVALID_ARGUMENT, also with explicit placement.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_placement_local_slot(const treeattn_placement_t *placement,
                                                int32_t world,
                                                int32_t global_length,
                                                int32_t position,
                                                int32_t *slot);

/**
 * The global position of a rank's local slot.
 *
 * @param position receives the position.
 * @return OK; INVALID_ARGUMENT, also with explicit placement.
 *
 * **Threads**: any. Does not block. Capture-safe. **Since** 0.1.
 */
treeattn_status_t treeattn_placement_global_position(const treeattn_placement_t *placement,
                                                     int32_t world,
                                                     int32_t rank,
                                                     int32_t global_length,
                                                     int32_t slot,
                                                     int32_t *position);

/**
 * Runs a shape on this machine: random inputs, sharded over local ranks, decoded, compared with a float64 reference under
 * the library's error bounds.
 *
 * @param config NULL for defaults.
 * @param report set report->struct_size first.
 * @return OK where the check could be run (look at report->passed); UNSUPPORTED naming the field; INVALID_ARGUMENT;
 * BAD_HANDLE; UNAVAILABLE; NO_MEMORY.
 *
 * **Threads**: any. Blocks: about (kv_length x q_heads x head_dim) multiply-adds in float64. Not during stream capture.
 * **Since** 0.1.
 */
treeattn_status_t treeattn_selfcheck(treeattn_runtime_t *runtime,
                                     treeattn_device_t device,
                                     const treeattn_attention_desc_t *desc,
                                     const treeattn_selfcheck_config_t *config,
                                     treeattn_selfcheck_report_t *report);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TREEATTN_H */
