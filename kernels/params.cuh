// What the host passes to the kernels: plain data, fixed layout, mirrored by the launch side (repr(C)).
//
// Kernels are found by name in the image:
//
//   treeattn_decode_fma_d{QK}x{V}_r2_{TYPE}         2 packed query rows a tile
//   treeattn_decode_mma_d{QK}x{V}_r{ROWS}_{TYPES}   ROWS = 8 or 16 packed query rows a tile
//   treeattn_decode_terms_d{QK}x{V}_r8_{TYPE}       the same with windows, masks and whatever else changes scores
//   treeattn_decode_narrow_d{QK}x{V}_r8             the same of k and v of any types, and with scales
//   treeattn_decode_packed_d{QK}x{V}_r8_{TYPE}      the same of k and v of one byte an element, in whole units of 16 bytes
//   treeattn_decode_wide_{TYPE}                     the same of head dims up to 576 and 512, of k and v of one 16-bit type
//   treeattn_decode_wide_view_{TYPE}                the same where rows of v are parts of the rows of k, in whole units of 16 bytes
//   treeattn_merge_partials                         merge of n given partials
//   treeattn_exchange                               exchange of partials with peers
//   treeattn_exchange_rows_{RANKS}                  the same where every row has a warp, of up to 2, 4 or 8 ranks; _2_f32: all f32
//   treeattn_weighted                               the same of log-sum-exps alone: each rank gets its own part of a row
//   treeattn_check, treeattn_check_outputs          what comes before and after the steps of plans with the flag CHECKED
//   treeattn_gather_queries                         the queries of all heads, of ranks that have those of their own
//
// {QK}x{V} is the smallest class that holds both head dims, out of
//   64x64, 96x96, 128x128, 192x128, 256x256
// (80 runs in 96, 112 in 128, 192 with v > 128 in 256; every head dim is a multiple of 8). {TYPES} are those of k and
// v: bf16, f16, bf16_f16 (k, v) or f16_bf16; other element types are run-time fields. r2 exists where k and v are of one type,
// r16 where the class is 128x128 or less, too. A packed row is (query token, head of the group); a sequence with more
// rows than ROWS runs as more tiles, so every kernel of a class is correct for every shape: choose r2 up to 2 rows, r8 up
// to 8, r16 above.
//
// Kernels of decode_terms, decode_narrow, decode_packed, decode_blocks and decode_wide take TermsParams. Their classes are 64x64, 128x128
// and 256x256, but for decode_wide; TYPE is bf16 or f16. Those of decode_packed and decode_blocks are 64x64 and 128x128, for these head dims alone, and
// f8_e4m3, f8_e5m2 or int8; q8_0 or q4_0. To decode_blocks kFlagNoBulk says that the rows of a head do not all begin as far into a unit of
// 16 bytes; to decode_narrow, that rows have to be widened by way of shared memory: some row of k or v is of a type that widen.cuh
// does not widen in registers, or its blocks do not lie side by side.
//
// Beside each kernel NAME the image holds a constant NAME_launch of type KernelLaunch, for that architecture.
#pragma once

#include "abi.cuh"
#include "rows.cuh"

namespace treeattn {

// How a kernel is launched: `threads` x 1 x 1, a grid of SMs * blocks_per_sm (any grid >= 1 is correct; keep it fixed
// for a plan), `dynamic_smem` bytes (raise CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES to it), programmatic stream
// serialization allowed where the GPU is sm_90 or later.
struct KernelLaunch {
    int32_t threads;
    int32_t dynamic_smem;
    int32_t blocks_per_sm;
    int32_t partial_bytes;  // of one split partial
    int32_t counters;       // of a block of the grid
    int32_t rows;           // of a query tile
    int32_t open_tiles;     // key tiles of an item that a block may take without closing sums (long_sums.cuh)
    int32_t long_bytes;     // of a block's closed sums
};

// Memory of a plan that outlives a step. Never shared by two launches that may overlap.
struct Workspace {
    float* partials;     // 4 * grid partials of KernelLaunch::partial_bytes, 256-byte aligned; behind them, where a block may take
                         // more key tiles of an item than open_tiles, grid * long_bytes. Contents never matter
    uint32_t* counters;  // grid * KernelLaunch::counters; zeroed once when the plan is made, every launch leaves them zero
    uint64_t* status;    // two words of device memory: the largest pack_status of the bad data so far, 0 for none; where in
                         // mapped host memory to tell it (faults.cuh), 0 for nowhere: a later kernel takes it then
    uint64_t* found;     // two words of device memory, for the value that goes with it: a lock, and where in mapped host memory
                         // to leave it (leave_value)
};

// A word of bad data (partial::DataFault::word): (0xffffffff - sequence) << 32 | rank << 8 | cause. The largest word wins,
// so that the first faulty sequence does. A rank on its own says 0.
__host__ __device__ constexpr uint64_t pack_status(uint32_t sequence, uint32_t cause, uint32_t rank = 0) {
    return static_cast<uint64_t>(0xffffffffu - sequence) << kHighShift | rank << kRankShift | cause;
}

// How the partials of a rank reach its peers: windows, slots, epochs and what ends a wait. All zero: there is no
// exchange. What lies where in a window is said in ll.cuh; a word there is 64 bits.
struct ExchangeView {
    const uint64_t* slots;  // [world][parity] addresses of this rank's slots in the windows of the others, from the rank after
                            // it on, and in its own last
    const uint64_t* bases;  // [world] addresses of each rank's window, its own too
    uint64_t* window;       // this rank's
    uint64_t* host;         // HostWord, in mapped host memory
    int64_t slot_words;     // words between slots
    int64_t parity_words;   // words between the slots of a rank in one parity and in the other
    int64_t merged_at;      // word of the slot of merged rows in parity 0; the other parity's is the next slot
    uint64_t fingerprint;   // what this rank takes the step for
    uint64_t timeout_ns;    // how long a wait may last
    int32_t world;          // 2 to 64
    int32_t rank;
    int32_t wire_dtype;     // f32, f16, bf16
    int32_t mode;           // ExchangeMode
    int32_t heads;          // of a partial
    int32_t first_head;     // of this rank's output; 0 but for kScattered
    int32_t own_heads;      // of this rank's output, 0 or more
};

// One decode step on one device. Strides are bytes. Everything behind a pointer of int32 is read on the device, in the
// stream's order, and checked before an address is formed from it.
struct DecodeParams {
    // Tensors: q [token, q head, dim]; k, v [sequence or page, token or slot, kv head, dim].
    const void* q;
    const void* k;
    const void* v;
    int64_t q_stride[3];  // token, head, dim
    int64_t k_stride[4];  // sequence or page, token or slot, kv head, dim
    int64_t v_stride[4];
    RowTarget target;     // [token, q head, dim]; f32 for a partial that goes on to be merged. Its dim is head_dim_v

    const int32_t* query_start;     // [batch + 1]; null: query_tokens / batch tokens each
    const int32_t* kv_length;       // [batch]; null only for CSR pages with last_page_len
    const int32_t* global_length;   // [batch]; read only where causal and query_position is null
    const int32_t* kv_start;        // [batch], contiguous placement; null: 0
    const int32_t* kv_position;     // explicit placement: row b at b * kv_position_stride
    const int32_t* query_position;  // [query_tokens]; null: global_length - n_query + i
    const int32_t* block_table;     // [batch, max_pages]
    const int32_t* page_indptr;     // [batch + 1]
    const int32_t* page_indices;    // [num_page_indices]
    const int32_t* last_page_len;   // [batch]; null: kv_length counts
    int64_t kv_position_stride;     // elements
    int64_t block_table_stride;     // elements between rows of block_table
    int64_t num_page_indices;
    int64_t kv_capacity;            // most tokens of a sequence that the plan, k and v have room for; strided: of the first
    int64_t k_end;                  // strided: where a token of k may begin at most, bytes from the first of the first sequence
    int64_t v_end;                  // the same of v

    int32_t batch;
    int32_t query_tokens;  // of all sequences: an upper bound of query_start[batch]
    int32_t q_heads;
    int32_t kv_heads;
    int32_t group;         // q_heads / kv_heads
    int32_t head_dim_qk;   // multiple of 8, at most the class
    int32_t q_dtype;       // f32, f16, bf16
    int32_t kv_layout;
    int32_t page_size;     // tokens; ignored where strided
    int32_t num_pages;     // pages that exist
    int32_t placement;
    int32_t interleave;    // tokens a run, at least 1, interleaved placement
    int32_t rank;
    int32_t world;
    float scale;           // multiplies q.k; finite
    uint32_t flags;
    int32_t waiting;       // kFlagPush: how many blocks, the last of the grid, may wait for ranks that have not come; 0: a
                           // launch of treeattn_exchange merges what comes
    Workspace workspace;   // its status word is not used where rows are pushed
    ExchangeView exchange;  // kFlagPush

    __device__ __forceinline__ int head_dim_v() const { return target.dim; }
};

// What a step has beside that, for kernels that take TermsParams. Strides are bytes, and may be 0.
struct Terms {
    const void* sinks;        // f32 [q head]; null: none. Merged by rank 0 alone
    const void* slopes;       // f32 [q head]; null: none
    const void* mask;         // [sequence, q head, query token of the sequence, local slot]
    const void* mask_factor;  // f32 [q head]; null: 1
    const void* k_scale;      // f32 [sequence or page, token or slot, kv head]; null: 1
    const void* v_scale;
    int64_t sink_stride;
    int64_t slope_stride;
    int64_t factor_stride;
    int64_t mask_stride[4];
    uint64_t mask_bytes;
    int64_t k_scale_stride[3];
    int64_t v_scale_stride[3];
    int64_t k_scale_end;              // as DecodeParams::k_end
    int64_t v_scale_end;
    int64_t page_index_head_stride;   // elements between the page lists of kv heads; num_page_indices is of the first
    int64_t kv_position_head_stride;  // elements
    int32_t mask_element;             // kMaskNone, ...
    int32_t window;                   // keys that a query sees up to its own position; 0: all
    float softcap;                    // 0: none
    float cap_inverse;                // 1 / (softcap * log2 e)
    int32_t k_dtype;
    int32_t v_dtype;
};
struct TermsParams {
    DecodeParams step;
    Terms terms;
};

// Merge of n given partials, in index order. One warp a row (token, head): grid ceil(tokens * heads / 8), 256 threads, no
// dynamic shared memory.
struct MergeParams {
    RowSource source;  // the first partial
    RowTarget target;
    int64_t step[3];   // from a partial's o, from its lse and from its sum to the next one's
    int32_t partials;
    int32_t tokens;
    int32_t heads;
};

// One exchange: this rank's partial goes to its peers, theirs come, and the merged rows are written. A row is (token,
// head); a launch is about `rows` of them, the same on all ranks, no more than a slot holds. 256 threads a block, one warp
// a row, any grid of at least 1 block (the same in all launches is not needed), no dynamic shared memory.
struct ExchangeParams {
    RowSource source;   // [token, head, dim]; o null: there is none, or it is pushed
    RowTarget target;   // [token, own head, dim]
    int64_t first_row;  // token * heads + head
    int64_t rows;       // 0: a step without rows
    int32_t is_pushed;  // 1: the launch before has pushed this rank's header and rows
    int32_t is_last;    // 1: no other exchange belongs to the step
    int32_t waiting;    // how many blocks, the last of the grid, may wait for ranks that have not come; at least 1
    int32_t lse_in_two; // 1: each lse of the source is two floats, the second what the first lacks
    ExchangeView view;
};

// The check of a step: an exchange of records before it, NaN after it (check.cu). 256 threads a block, no dynamic shared
// memory, any grid of at least 1 block, the same sequences on all ranks. All blocks of treeattn_check wait for ranks.
struct CheckParams {
    DecodeParams step;  // with its exchange; k, v, partials and status are not used
    int2* wrong;        // [batch] first token and tokens, by any rank, of sequences in which ranks do not fit together; of others
                        // no tokens
    int32_t first;      // sequence of the launch, and how many: no more records than a slot holds
    int32_t count;
    int32_t needs_positions;  // 1: bad positions are bad data
    int32_t surplus_keys;     // 1: keys at or beyond global_length are allowed
};

// The gather of queries before a step whose ranks have those of their own heads (queries.cu), or of a part of them. Rows of a
// rank are counted alike: token * its heads + its head. 256 threads a block, no dynamic shared memory, any grid of at least 1
// block; all blocks wait for ranks.
struct QueryParams {
    const void* q;         // [token, own head, dim]
    char* gathered;        // [token, head, dim] of all ranks, without gaps
    int64_t q_stride[3];   // token, own head, dim
    int64_t first_row;     // of the launch
    int32_t rows;          // of the rank that has the most heads, at least 1: no more than a slot holds
    int32_t tokens;
    int32_t words;         // of 32 bits, of a row: a multiple of 4
    int32_t element_bytes; // 2 or 4
    ExchangeView view;
};

// What lies between the allreduces of the baseline (allreduce.cu).
struct AllreduceParams {
    float* o;                // [token, head, dim] this rank's partial; numerators after weigh
    float* lse;              // [token, head]
    float* most;             // [token, head] the largest lse of all ranks
    float* weights;          // [token, head], then two words of bad data a rank
    RowTarget target;        // [token, own head, dim]
    uint64_t* status;        // this rank's bad data (pack_status), 0 for none; taken by begin
    uint64_t* words;         // device memory of the plan: steps begun, steps ended
    const uint64_t* failed;  // device memory: not 0 once the communicator is broken, outputs are then NaN
    uint64_t* host;          // mapped host memory: steps begun, steps ended, bad data with its rank
    uint32_t* arrived;       // blocks of finish that are done; it leaves 0
    int32_t tokens;
    int32_t heads;
    int32_t head_dim;
    int32_t first_head;      // of this rank's output
    int32_t own_heads;       // of this rank's output
    int32_t rank;
    int32_t world;
};

// What lies around the allgather of a step over NCCL (gather.cu). A message is a header of kGatherHeaderBytes, then a row for
// each (token, head): its log-sum-exp in two floats, and from byte kGatherRowHead on its o in the wire's type.
struct GatherParams {
    RowSource source;      // begin: [token, head, dim] the partial to send; o null: it is written to the message itself
    RowTarget target;      // merge: [token, own head, dim]
    char* send;            // this rank's message
    const char* received;  // those of all ranks, in rank order
    int64_t message_bytes; // from one to the next
    int64_t row_bytes;     // of a row of a message, a multiple of 16
    uint64_t fingerprint;  // of the call
    uint64_t* words;       // device memory of the plan: steps begun, steps ended
    uint64_t* failed;      // device memory: not 0 once the communicator is broken, outputs are then NaN
    uint64_t* host;        // mapped host memory: steps begun, steps ended, bad data with its rank
    uint64_t* failure;     // mapped host memory: the failure that a step has found
    uint32_t* arrived;     // blocks of merge that are done; it leaves 0
    const int32_t* merged; // [partials] the messages to merge, in this order; null: all of them
    const int32_t* senders; // [world] the ranks that messages come from, where these are not those of NCCL; null: they are
    int32_t wire_dtype;    // of o in messages
    int32_t lse_in_two;    // 1: each lse of the source is two floats, the second what the first lacks
    int32_t tokens;
    int32_t heads;
    int32_t first_head;    // of this rank's output
    int32_t own_heads;     // of this rank's output
    int32_t rank;          // in NCCL's communicator
    int32_t world;         // messages
    int32_t partials;      // of them to merge
};

// The exchange within a node that comes before (nodes.cu): any grid whose blocks are all resident.
struct NodeParams {
    GatherParams gather;    // with a source
    ExchangeView view;      // of the node's ranks, f32
    uint64_t* status;       // this rank's bad data, two words as Workspace::status; it leaves 0
    uint64_t* found;        // the node's bad data, pack_status with the rank; it leaves 0
    const int32_t* members; // [view.world] the node's ranks
    uint32_t* arrived;      // blocks that are done; it leaves 0
    int64_t first_row;      // token * heads + head
    int64_t rows;           // no more than a slot holds
    int32_t is_last;        // 1: no other launch belongs to the step
};

TREEATTN_CHECK_LAYOUT

}  // namespace treeattn
