// What the host passes to the kernels: plain data, fixed layout, mirrored by the launch side (repr(C)).
//
// Kernels are found by name in the image:
//
//   treeattn_decode_fma_d{QK}x{V}_r2_{TYPES}        2 packed query rows a tile
//   treeattn_decode_mma_d{QK}x{V}_r{ROWS}_{TYPES}   ROWS = 8 or 16 packed query rows a tile
//   treeattn_merge_partials                         merge of n given partials
//   treeattn_exchange                               exchange of partials with peers
//
// {QK}x{V} is the smallest class that holds both head dims, out of
//   64x64, 96x96, 128x128, 192x128, 256x256
// (80 runs in 96, 112 in 128, 192 with v > 128 in 256; every head dim is a multiple of 8). {TYPES} are those of k and
// v: bf16, f16, bf16_f16 (k, v) or f16_bf16; other element types are run-time fields. r16 exists where k and v are of
// one type and the class is 128x128 or less. A packed row is (query token, head of the group); a sequence with more
// rows than ROWS runs as more tiles, so every kernel of a class is correct for every shape: choose r2 up to 2 rows, r8 up
// to 8, r16 above.
//
// Beside each kernel NAME the image holds a constant NAME_shape of type KernelShape, for that architecture.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace treeattn {

// Codes of the C ABI.
enum : int32_t { kF32 = 1, kF16 = 2, kBf16 = 3 };
enum : int32_t { kStrided = 0, kBlockTable = 1, kCsrPages = 2 };
enum : int32_t { kContiguous = 0, kInterleaved = 1, kExplicit = 2 };

// Which input of a step was out of range (partial::DataFaultCause).
enum : uint32_t {
    kFaultNone = 0,
    kFaultQueryStart = 1,
    kFaultKvLength = 2,
    kFaultPage = 3,
    kFaultPageRow = 4,
    kFaultPosition = 5,
};

// DecodeParams::flags
enum : uint32_t {
    kFlagCausal = 1,    // a key is hidden from queries at earlier global positions
    kFlagKvStable = 2,  // keys and values older than the step's own tokens may be read before the dependency wait
    kFlagNoBulk = 4,    // rows of k or v are not 16-byte aligned or not dense: copy them element by element
    kFlagPush = 8,      // rows are pushed to the ranks of `exchange`, and not written
};

// How a kernel is launched: `threads` x 1 x 1, a grid of SMs * blocks_per_sm (any grid >= 1 is correct; keep it fixed
// for a plan), `dynamic_smem` bytes (raise CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES to it), programmatic stream
// serialization allowed where the GPU is sm_90 or later.
struct KernelShape {
    int32_t threads;
    int32_t dynamic_smem;
    int32_t blocks_per_sm;
    int32_t rows;           // packed query rows a tile
    int32_t head_dim_qk;    // of the class
    int32_t head_dim_v;
    int32_t partial_bytes;  // of one split partial
    int32_t counters;       // of a block of the grid
};
static_assert(sizeof(KernelShape) == 32, "mirrored by the launch side");

// Device memory of a plan that outlives a step. Never shared by two launches that may overlap.
struct Workspace {
    float* partials;        // 4 * grid partials of KernelShape::partial_bytes, 256-byte aligned; contents never matter
    uint32_t* counters;     // grid * KernelShape::counters; zeroed once when the plan is made, every launch leaves them zero
    uint64_t* status;       // 1; 0: no fault so far. See pack_status
    uint64_t* host_status;  // the same word in mapped host memory, written when `status` rises; may be null
};
static_assert(sizeof(Workspace) == 32, "mirrored by the launch side");

// A status word: (0xffffffff - sequence) << 32 | rank << 8 | cause. The largest word wins, so that the first faulty
// sequence does. A rank on its own says 0.
__host__ __device__ constexpr uint64_t pack_status(uint32_t sequence, uint32_t cause, uint32_t rank = 0) {
    return static_cast<uint64_t>(0xffffffffu - sequence) << 32 | rank << 8 | cause;
}

// How the partials of a rank reach its peers: windows, slots, epochs and what ends a wait. All zero: there is no
// exchange. What lies where in a window is said in ll.cuh; a word there is 64 bits.
struct ExchangeView {
    const uint64_t* peers;   //   0  [world] addresses of this rank's slot of parity 0 in each rank's window, its own too
    const uint64_t* bases;   //   8  [world] addresses of each rank's window
    uint64_t* window;        //  16  this rank's
    uint64_t* host;          //  24  HostWord, in mapped host memory
    int64_t slot_words;      //  32  words between slots
    int64_t parity_words;    //  40  words between the slots of a rank in one parity and in the other
    int64_t merged_at;       //  48  word of the slot of merged rows in parity 0; the other parity's is the next slot
    uint64_t fingerprint;    //  56  what this rank takes the step for
    uint64_t timeout_ns;     //  64  how long a wait may last
    int32_t world;           //  72  2 to 64
    int32_t rank;            //  76
    int32_t wire_dtype;      //  80  f32, f16, bf16
    int32_t mode;            //  84  ExchangeMode
    int32_t heads;           //  88  of a partial
    int32_t first_head;      //  92  of this rank's output; 0 but for kScattered
    int32_t own_heads;       //  96  of this rank's output, 0 or more
    int32_t reserved[7];     // 100
};
static_assert(offsetof(ExchangeView, slot_words) == 32, "mirrored by the launch side");
static_assert(offsetof(ExchangeView, world) == 72, "mirrored by the launch side");
static_assert(offsetof(ExchangeView, own_heads) == 96, "mirrored by the launch side");
static_assert(sizeof(ExchangeView) == 128, "mirrored by the launch side");

// ExchangeView::mode
enum : int32_t {
    kOneShot = 0,    // every rank gets every row and merges it
    kScattered = 1,  // the owner of a head gets its rows and merges them, and nobody else has them
    kTwoShot = 2,    // the owner of a head merges its rows and sends them to all
};

// One decode step on one device. Strides are bytes. Everything behind a pointer of int32 is read on the device, in the
// stream's order, and checked before an address is formed from it.
struct DecodeParams {
    // Tensors: q, out [token, q head, dim]; k, v [sequence or page, token or slot, kv head, dim]; lse [token, q head].
    const void* q;                  //   0
    const void* k;                  //   8
    const void* v;                  //  16
    void* out;                      //  24
    float* lse;                     //  32  may be null
    int64_t q_stride[3];            //  40  token, head, dim
    int64_t k_stride[4];            //  64  sequence or page, token or slot, kv head, dim
    int64_t v_stride[4];            //  96
    int64_t out_stride[3];          // 128  token, head, dim
    int64_t lse_stride[2];          // 152  token, head

    const int32_t* query_start;     // 168  [batch + 1]; null: query_tokens / batch tokens each
    const int32_t* kv_length;       // 176  [batch]; null only for CSR pages with last_page_len
    const int32_t* global_length;   // 184  [batch]; read only where causal and query_position is null
    const int32_t* kv_start;        // 192  [batch], contiguous placement; null: 0
    const int32_t* kv_position;     // 200  explicit placement: row b at b * kv_position_stride
    const int32_t* query_position;  // 208  [query_tokens]; null: global_length - n_query + i
    const int32_t* block_table;     // 216  [batch, max_pages]
    const int32_t* page_indptr;     // 224  [batch + 1]
    const int32_t* page_indices;    // 232  [num_page_indices]
    const int32_t* last_page_len;   // 240  [batch]; null: kv_length counts
    int64_t kv_position_stride;     // 248  elements
    int64_t block_table_stride;     // 256  elements between rows of block_table
    int64_t num_page_indices;       // 264
    int64_t kv_capacity;            // 272  most tokens of a sequence that the plan, k and v have room for

    int32_t batch;                  // 280
    int32_t query_tokens;           // 284  of all sequences: an upper bound of query_start[batch]
    int32_t q_heads;                // 288
    int32_t kv_heads;               // 292
    int32_t group;                  // 296  q_heads / kv_heads
    int32_t head_dim_qk;            // 300  multiple of 8, at most the class
    int32_t head_dim_v;             // 304
    int32_t q_dtype;                // 308  f32, f16, bf16
    int32_t k_dtype;                // 312  f16, bf16
    int32_t v_dtype;                // 316  f16, bf16
    int32_t out_dtype;              // 320  f32, f16, bf16; f32 for a partial that goes on to be merged
    int32_t kv_layout;              // 324
    int32_t page_size;              // 328  tokens; ignored where strided
    int32_t num_pages;              // 332  pages that exist
    int32_t placement;              // 336
    int32_t interleave;             // 340  tokens a run, at least 1, interleaved placement
    int32_t rank;                   // 344
    int32_t world;                  // 348
    float scale;                    // 352  multiplies q.k; finite
    uint32_t flags;                 // 356
    int32_t waiting;                // 360  kFlagPush: how many blocks, the last of the grid, merge what comes; 0: a launch
                                    //      of treeattn_exchange does
    int32_t min_tiles;              // 364  least key tiles of 16 a block takes before the next one gets any; 0: default
    Workspace workspace;            // 368
    ExchangeView exchange;          // 400  kFlagPush; its status word is then kFault of the window
};
static_assert(offsetof(DecodeParams, q_stride) == 40, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, query_start) == 168, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, kv_position_stride) == 248, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, batch) == 280, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, scale) == 352, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, workspace) == 368, "mirrored by the launch side");
static_assert(offsetof(DecodeParams, exchange) == 400, "mirrored by the launch side");
static_assert(sizeof(DecodeParams) == 528, "mirrored by the launch side");

// Merge of n given partials, in index order. o [partial, token, head, dim], lse [partial, token, head].
// One warp a row (token, head): grid ceil(tokens * heads / 8), 256 threads, no dynamic shared memory.
struct MergeParams {
    const void* o;             //   0
    const float* lse;          //   8
    void* out;                 //  16
    float* out_lse;            //  24  may be null
    int64_t o_stride[4];       //  32  partial, token, head, dim; bytes
    int64_t lse_stride[3];     //  64  partial, token, head
    int64_t out_stride[3];     //  88  token, head, dim
    int64_t out_lse_stride[2]; // 112  token, head
    int32_t partials;          // 128
    int32_t tokens;            // 132
    int32_t heads;             // 136
    int32_t head_dim;          // 140  any number of at least 1
    int32_t o_dtype;           // 144
    int32_t out_dtype;         // 148
    float to_natural;          // 152  1, or ln 2 where the incoming lse has base 2
    int32_t plus_inf_is_empty; // 156
};
static_assert(offsetof(MergeParams, o_stride) == 32, "mirrored by the launch side");
static_assert(offsetof(MergeParams, partials) == 128, "mirrored by the launch side");
static_assert(sizeof(MergeParams) == 160, "mirrored by the launch side");

// One exchange: this rank's partial goes to its peers, theirs come, and the merged rows are written. A row is (token,
// head); a launch is about `rows` of them, the same on all ranks, no more than a slot holds. 256 threads a block, one warp
// a row, any grid of at least 1 block (the same in all launches is not needed), no dynamic shared memory.
struct ExchangeParams {
    const void* o;             //   0  [token, head, dim]
    const float* lse;          //   8  [token, head]
    void* out;                 //  16  [token, own head, dim]
    float* out_lse;            //  24  [token, own head]; may be null
    int64_t o_stride[3];       //  32  bytes
    int64_t lse_stride[2];     //  56
    int64_t out_stride[3];     //  72
    int64_t out_lse_stride[2]; //  96
    int64_t first_row;         // 112  token * heads + head
    int64_t rows;              // 120  0: a step without rows
    int32_t head_dim;          // 128  any number of at least 1
    int32_t o_dtype;           // 132
    int32_t out_dtype;         // 136
    float to_natural;          // 140  1, or ln 2 where the incoming lse has base 2
    int32_t plus_inf_is_empty; // 144
    int32_t is_pushed;         // 148  1: the launch before has pushed this rank's header and rows
    int32_t is_last;           // 152  1: no other exchange belongs to the step
    int32_t reserved;          // 156
    ExchangeView view;         // 160
};
static_assert(offsetof(ExchangeParams, o_stride) == 32, "mirrored by the launch side");
static_assert(offsetof(ExchangeParams, first_row) == 112, "mirrored by the launch side");
static_assert(offsetof(ExchangeParams, view) == 160, "mirrored by the launch side");
static_assert(sizeof(ExchangeParams) == 288, "mirrored by the launch side");

}  // namespace treeattn
