// Generated from src/cuda/abi: TREEATTN_BLESS=1 cargo test --lib abi writes it anew.
//
// What the library and its kernels agree on. TREEATTN_CHECK_LAYOUT asserts that the structs of params.cuh and
// rows.cuh are those of the library, field by field.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace treeattn {

// Element types.
enum : int32_t {
    kF32 = 1,
    kF16 = 2,
    kBf16 = 3,
};
// Layouts of k and v.
enum : int32_t {
    kStrided = 0,
    kBlockTable = 1,
    kCsrPages = 2,
};
// Placements of tokens.
enum : int32_t {
    kContiguous = 0,
    kInterleaved = 1,
    kExplicit = 2,
};
// Blocks of merges and exchanges, how a grid shares out its work, and what exchange_rows serves, as src/cuda/params.rs says.
enum : int {
    kRowsABlock = 8,
    kRowThreads = 256,
    kExchangeBlocksAUnit = 2,
    kRowsMostRanks = 8,
    kRowsMostWords = 128,
    kTile = 16,
    kPartialsABlock = 4,
    kFanIn = 16,
    kMostPartials = 256,
    kMinTiles = 4,
    kMaxShares = 512,
};
// Words that AllreduceParams::host and ::words have: steps begun, steps ended, bad data.
enum : int {
    kStepsBegun = 0,
    kStepsEnded = 1,
    kStepBadData = 2,
};
// DecodeParams::flags, as src/cuda/params.rs says.
enum : uint32_t {
    kFlagCausal = 1,
    kFlagNoBulk = 2,
    kFlagPush = 4,
    kFlagLseInTwo = 8,
};
// RowSource::empties, as src/partial/rows.rs says.
enum : uint32_t {
    kPlusInfIsEmpty = 1,
    kNanIsEmpty = 2,
};
// Which input of a step was out of range (partial::DataFaultCause).
enum : uint32_t {
    kFaultNone = 0,
    kFaultQueryStart = 1,
    kFaultKvLength = 2,
    kFaultPage = 3,
    kFaultPageRow = 4,
    kFaultPosition = 5,
    kFaultPageIndptr = 12,
    kFaultLastPageLen = 13,
    kFaultGlobalLength = 14,
    kFaultKvStart = 15,
    kFaultKvPosition = 16,
    kFaultQueryPosition = 17,
    kFaultBlockTable = 18,
    kFaultPageIndices = 19,
    kFaultMask = 21,
};
// ExchangeView::mode: who gets which rows (partial::view::ExchangeMode).
enum : int32_t {
    kOneShot = 0,
    kScattered = 1,
    kTwoShot = 2,
};
// Words of a window before its slots (partial::view::window).
enum : int {
    kBroken = 0,
    kConsumed = 128,
    kFailed = 129,
    kFault = 130,
    kTickets = 132,
    kDecided = 136,
    kLeftOver = 144,
    kLeftOverWords = 8,
    kStepFault = 138,
    kTold = 140,
    kPending = 142,
    kArrived = 135,
    kLeft = 192,
    kControlWords = 512,
};
// Words of a slot before its rows, and of a row before its o.
enum : int {
    kHeaderWords = 16,
    kRowHead = 2,
};
// Words in mapped host memory (partial::view::host).
enum : int {
    kCommand = 0,
    kFailure = 1,
    kBadData = 2,
    kTakenAfter = 1,
    kLost = 4,
};
// Words in mapped host memory of a value that was out of range (partial::view::value).
enum : int {
    kValueKey = 0,
    kValueIndex = 1,
    kValueFound = 2,
    kValueLeast = 3,
    kValueMost = 4,
};
// Most ranks; slots of a rank, one a parity of the epoch.
enum : int {
    kMaxRanks = 64,
    kSlots = 2,
};
// Where the flag of a packet lies; the epoch after the largest one; kConsumed's unit.
enum : uint32_t {
    kFlagShift = 32,
    kAfterWrap = 2,
    kLaunchShift = 16,
};
// Where failures and bad data have their rank, and their epoch or sequence.
enum : int {
    kRankShift = 8,
    kHighShift = 32,
};
// Toggled in words of bad data that the host is told.
enum : uint32_t {
    kTurn = 128,
};
// Codes of a failure: those of the C ABI.
enum : uint32_t {
    kDesync = 7,
    kTimeout = 8,
    kPeerLost = 9,
};
// Further element types, of keys and values.
enum : int32_t {
    kF8E4M3 = 4,
    kF8E5M2 = 5,
    kQ8_0 = 6,
    kQ4_0 = 7,
    kInt8 = 8,
    kQ4_1 = 9,
    kQ5_0 = 10,
    kQ5_1 = 11,
    kIq4Nl = 12,
};
// Elements of a block, and bytes of one (attention::KvFormat).
enum : int {
    kBlock = 32,
    kQ8_0Bytes = 34,
    kQ4_0Bytes = 18,
};
// Terms::mask_element.
enum : int32_t {
    kMaskNone = 0,
    kMaskF16 = 1,
    kMaskF32 = 2,
    kMaskByte = 3,
};
// What ranks of a checked plan disagree in (partial::DataFaultCause).
enum : uint32_t {
    kFaultQueryStartDiffers = 6,
    kFaultGlobalLengthDiffers = 7,
    kFaultQueryPositionDiffers = 8,
    kFaultQueryDiffers = 9,
    kFaultKeysTwice = 10,
    kFaultKeysMissing = 11,
    kFaultKeysOutside = 20,
};
// Words of data of what a rank tells of a sequence (attention::SequenceRecord).
enum : int {
    kRecordWords = 16,
};
// Bytes of a message before its rows, and of a row before its o.
enum : int {
    kGatherHeaderBytes = 64,
    kGatherRowHead = 16,
};
// Words of a message's header: bad data (pack_status; the next stays 0), what tells steps apart, a failure.
enum : int {
    kGatherBadData = 0,
    kGatherStep = 2,
    kGatherFailure = 3,
};

// The hashes of what all kernels know, and of what those that take further parameters do; each image carries its own.
constexpr uint64_t kAbi = 0xb3fd0fe36fce2b2b;
constexpr uint64_t kTermsAbi = 0x20d6831496caf2f2;
constexpr uint64_t kCheckAbi = 0x5778ee9ab12e9968;
constexpr uint64_t kQueryAbi = 0x74bc84bea94b92bb;
constexpr uint64_t kGatherAbi = 0xb96fa87f162efeff;

}  // namespace treeattn

// Once in each kernels/NAME.cu: the image's word that it was compiled from this.
#define TREEATTN_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kAbi;
#define TREEATTN_TERMS_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kTermsAbi;
#define TREEATTN_CHECK_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kCheckAbi;
#define TREEATTN_QUERY_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kQueryAbi;
#define TREEATTN_GATHER_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kGatherAbi;

#define TREEATTN_CHECK_LAYOUT \
    static_assert(sizeof(KernelLaunch) == 32, "KernelLaunch"); \
    static_assert(offsetof(KernelLaunch, threads) == 0, "KernelLaunch::threads"); \
    static_assert(offsetof(KernelLaunch, dynamic_smem) == 4, "KernelLaunch::dynamic_smem"); \
    static_assert(offsetof(KernelLaunch, blocks_per_sm) == 8, "KernelLaunch::blocks_per_sm"); \
    static_assert(offsetof(KernelLaunch, partial_bytes) == 12, "KernelLaunch::partial_bytes"); \
    static_assert(offsetof(KernelLaunch, counters) == 16, "KernelLaunch::counters"); \
    static_assert(offsetof(KernelLaunch, rows) == 20, "KernelLaunch::rows"); \
    static_assert(offsetof(KernelLaunch, open_tiles) == 24, "KernelLaunch::open_tiles"); \
    static_assert(offsetof(KernelLaunch, long_bytes) == 28, "KernelLaunch::long_bytes"); \
    static_assert(sizeof(Workspace) == 32, "Workspace"); \
    static_assert(offsetof(Workspace, partials) == 0, "Workspace::partials"); \
    static_assert(offsetof(Workspace, counters) == 8, "Workspace::counters"); \
    static_assert(offsetof(Workspace, status) == 16, "Workspace::status"); \
    static_assert(offsetof(Workspace, found) == 24, "Workspace::found"); \
    static_assert(sizeof(RowTarget) == 72, "RowTarget"); \
    static_assert(offsetof(RowTarget, o) == 0, "RowTarget::o"); \
    static_assert(offsetof(RowTarget, lse) == 8, "RowTarget::lse"); \
    static_assert(offsetof(RowTarget, o_stride) == 16, "RowTarget::o_stride"); \
    static_assert(offsetof(RowTarget, lse_stride) == 40, "RowTarget::lse_stride"); \
    static_assert(offsetof(RowTarget, dtype) == 56, "RowTarget::dtype"); \
    static_assert(offsetof(RowTarget, dim) == 60, "RowTarget::dim"); \
    static_assert(offsetof(RowTarget, from_natural) == 64, "RowTarget::from_natural"); \
    static_assert(offsetof(RowTarget, reserved) == 68, "RowTarget::reserved"); \
    static_assert(sizeof(RowSource) == 120, "RowSource"); \
    static_assert(offsetof(RowSource, o) == 0, "RowSource::o"); \
    static_assert(offsetof(RowSource, lse) == 8, "RowSource::lse"); \
    static_assert(offsetof(RowSource, o_stride) == 16, "RowSource::o_stride"); \
    static_assert(offsetof(RowSource, lse_stride) == 40, "RowSource::lse_stride"); \
    static_assert(offsetof(RowSource, dtype) == 56, "RowSource::dtype"); \
    static_assert(offsetof(RowSource, dim) == 60, "RowSource::dim"); \
    static_assert(offsetof(RowSource, to_natural) == 64, "RowSource::to_natural"); \
    static_assert(offsetof(RowSource, empties) == 68, "RowSource::empties"); \
    static_assert(offsetof(RowSource, sum) == 72, "RowSource::sum"); \
    static_assert(offsetof(RowSource, sum_stride) == 80, "RowSource::sum_stride"); \
    static_assert(offsetof(RowSource, query_start) == 96, "RowSource::query_start"); \
    static_assert(offsetof(RowSource, kv_length) == 104, "RowSource::kv_length"); \
    static_assert(offsetof(RowSource, batch) == 112, "RowSource::batch"); \
    static_assert(offsetof(RowSource, tokens_each) == 116, "RowSource::tokens_each"); \
    static_assert(sizeof(ExchangeView) == 104, "ExchangeView"); \
    static_assert(offsetof(ExchangeView, slots) == 0, "ExchangeView::slots"); \
    static_assert(offsetof(ExchangeView, bases) == 8, "ExchangeView::bases"); \
    static_assert(offsetof(ExchangeView, window) == 16, "ExchangeView::window"); \
    static_assert(offsetof(ExchangeView, host) == 24, "ExchangeView::host"); \
    static_assert(offsetof(ExchangeView, slot_words) == 32, "ExchangeView::slot_words"); \
    static_assert(offsetof(ExchangeView, parity_words) == 40, "ExchangeView::parity_words"); \
    static_assert(offsetof(ExchangeView, merged_at) == 48, "ExchangeView::merged_at"); \
    static_assert(offsetof(ExchangeView, fingerprint) == 56, "ExchangeView::fingerprint"); \
    static_assert(offsetof(ExchangeView, timeout_ns) == 64, "ExchangeView::timeout_ns"); \
    static_assert(offsetof(ExchangeView, world) == 72, "ExchangeView::world"); \
    static_assert(offsetof(ExchangeView, rank) == 76, "ExchangeView::rank"); \
    static_assert(offsetof(ExchangeView, wire_dtype) == 80, "ExchangeView::wire_dtype"); \
    static_assert(offsetof(ExchangeView, mode) == 84, "ExchangeView::mode"); \
    static_assert(offsetof(ExchangeView, heads) == 88, "ExchangeView::heads"); \
    static_assert(offsetof(ExchangeView, first_head) == 92, "ExchangeView::first_head"); \
    static_assert(offsetof(ExchangeView, own_heads) == 96, "ExchangeView::own_heads"); \
    static_assert(sizeof(DecodeParams) == 520, "DecodeParams"); \
    static_assert(offsetof(DecodeParams, q) == 0, "DecodeParams::q"); \
    static_assert(offsetof(DecodeParams, k) == 8, "DecodeParams::k"); \
    static_assert(offsetof(DecodeParams, v) == 16, "DecodeParams::v"); \
    static_assert(offsetof(DecodeParams, q_stride) == 24, "DecodeParams::q_stride"); \
    static_assert(offsetof(DecodeParams, k_stride) == 48, "DecodeParams::k_stride"); \
    static_assert(offsetof(DecodeParams, v_stride) == 80, "DecodeParams::v_stride"); \
    static_assert(offsetof(DecodeParams, target) == 112, "DecodeParams::target"); \
    static_assert(offsetof(DecodeParams, query_start) == 184, "DecodeParams::query_start"); \
    static_assert(offsetof(DecodeParams, kv_length) == 192, "DecodeParams::kv_length"); \
    static_assert(offsetof(DecodeParams, global_length) == 200, "DecodeParams::global_length"); \
    static_assert(offsetof(DecodeParams, kv_start) == 208, "DecodeParams::kv_start"); \
    static_assert(offsetof(DecodeParams, kv_position) == 216, "DecodeParams::kv_position"); \
    static_assert(offsetof(DecodeParams, query_position) == 224, "DecodeParams::query_position"); \
    static_assert(offsetof(DecodeParams, block_table) == 232, "DecodeParams::block_table"); \
    static_assert(offsetof(DecodeParams, page_indptr) == 240, "DecodeParams::page_indptr"); \
    static_assert(offsetof(DecodeParams, page_indices) == 248, "DecodeParams::page_indices"); \
    static_assert(offsetof(DecodeParams, last_page_len) == 256, "DecodeParams::last_page_len"); \
    static_assert(offsetof(DecodeParams, kv_position_stride) == 264, "DecodeParams::kv_position_stride"); \
    static_assert(offsetof(DecodeParams, block_table_stride) == 272, "DecodeParams::block_table_stride"); \
    static_assert(offsetof(DecodeParams, num_page_indices) == 280, "DecodeParams::num_page_indices"); \
    static_assert(offsetof(DecodeParams, kv_capacity) == 288, "DecodeParams::kv_capacity"); \
    static_assert(offsetof(DecodeParams, k_end) == 296, "DecodeParams::k_end"); \
    static_assert(offsetof(DecodeParams, v_end) == 304, "DecodeParams::v_end"); \
    static_assert(offsetof(DecodeParams, batch) == 312, "DecodeParams::batch"); \
    static_assert(offsetof(DecodeParams, query_tokens) == 316, "DecodeParams::query_tokens"); \
    static_assert(offsetof(DecodeParams, q_heads) == 320, "DecodeParams::q_heads"); \
    static_assert(offsetof(DecodeParams, kv_heads) == 324, "DecodeParams::kv_heads"); \
    static_assert(offsetof(DecodeParams, group) == 328, "DecodeParams::group"); \
    static_assert(offsetof(DecodeParams, head_dim_qk) == 332, "DecodeParams::head_dim_qk"); \
    static_assert(offsetof(DecodeParams, q_dtype) == 336, "DecodeParams::q_dtype"); \
    static_assert(offsetof(DecodeParams, kv_layout) == 340, "DecodeParams::kv_layout"); \
    static_assert(offsetof(DecodeParams, page_size) == 344, "DecodeParams::page_size"); \
    static_assert(offsetof(DecodeParams, num_pages) == 348, "DecodeParams::num_pages"); \
    static_assert(offsetof(DecodeParams, placement) == 352, "DecodeParams::placement"); \
    static_assert(offsetof(DecodeParams, interleave) == 356, "DecodeParams::interleave"); \
    static_assert(offsetof(DecodeParams, rank) == 360, "DecodeParams::rank"); \
    static_assert(offsetof(DecodeParams, world) == 364, "DecodeParams::world"); \
    static_assert(offsetof(DecodeParams, scale) == 368, "DecodeParams::scale"); \
    static_assert(offsetof(DecodeParams, flags) == 372, "DecodeParams::flags"); \
    static_assert(offsetof(DecodeParams, waiting) == 376, "DecodeParams::waiting"); \
    static_assert(offsetof(DecodeParams, workspace) == 384, "DecodeParams::workspace"); \
    static_assert(offsetof(DecodeParams, exchange) == 416, "DecodeParams::exchange"); \
    static_assert(sizeof(MergeParams) == 232, "MergeParams"); \
    static_assert(offsetof(MergeParams, source) == 0, "MergeParams::source"); \
    static_assert(offsetof(MergeParams, target) == 120, "MergeParams::target"); \
    static_assert(offsetof(MergeParams, step) == 192, "MergeParams::step"); \
    static_assert(offsetof(MergeParams, partials) == 216, "MergeParams::partials"); \
    static_assert(offsetof(MergeParams, tokens) == 220, "MergeParams::tokens"); \
    static_assert(offsetof(MergeParams, heads) == 224, "MergeParams::heads"); \
    static_assert(sizeof(ExchangeParams) == 328, "ExchangeParams"); \
    static_assert(offsetof(ExchangeParams, source) == 0, "ExchangeParams::source"); \
    static_assert(offsetof(ExchangeParams, target) == 120, "ExchangeParams::target"); \
    static_assert(offsetof(ExchangeParams, first_row) == 192, "ExchangeParams::first_row"); \
    static_assert(offsetof(ExchangeParams, rows) == 200, "ExchangeParams::rows"); \
    static_assert(offsetof(ExchangeParams, is_pushed) == 208, "ExchangeParams::is_pushed"); \
    static_assert(offsetof(ExchangeParams, is_last) == 212, "ExchangeParams::is_last"); \
    static_assert(offsetof(ExchangeParams, waiting) == 216, "ExchangeParams::waiting"); \
    static_assert(offsetof(ExchangeParams, lse_in_two) == 220, "ExchangeParams::lse_in_two"); \
    static_assert(offsetof(ExchangeParams, view) == 224, "ExchangeParams::view"); \
    static_assert(sizeof(AllreduceParams) == 176, "AllreduceParams"); \
    static_assert(offsetof(AllreduceParams, o) == 0, "AllreduceParams::o"); \
    static_assert(offsetof(AllreduceParams, lse) == 8, "AllreduceParams::lse"); \
    static_assert(offsetof(AllreduceParams, most) == 16, "AllreduceParams::most"); \
    static_assert(offsetof(AllreduceParams, weights) == 24, "AllreduceParams::weights"); \
    static_assert(offsetof(AllreduceParams, target) == 32, "AllreduceParams::target"); \
    static_assert(offsetof(AllreduceParams, status) == 104, "AllreduceParams::status"); \
    static_assert(offsetof(AllreduceParams, words) == 112, "AllreduceParams::words"); \
    static_assert(offsetof(AllreduceParams, failed) == 120, "AllreduceParams::failed"); \
    static_assert(offsetof(AllreduceParams, host) == 128, "AllreduceParams::host"); \
    static_assert(offsetof(AllreduceParams, arrived) == 136, "AllreduceParams::arrived"); \
    static_assert(offsetof(AllreduceParams, tokens) == 144, "AllreduceParams::tokens"); \
    static_assert(offsetof(AllreduceParams, heads) == 148, "AllreduceParams::heads"); \
    static_assert(offsetof(AllreduceParams, head_dim) == 152, "AllreduceParams::head_dim"); \
    static_assert(offsetof(AllreduceParams, first_head) == 156, "AllreduceParams::first_head"); \
    static_assert(offsetof(AllreduceParams, own_heads) == 160, "AllreduceParams::own_heads"); \
    static_assert(offsetof(AllreduceParams, rank) == 164, "AllreduceParams::rank"); \
    static_assert(offsetof(AllreduceParams, world) == 168, "AllreduceParams::world"); \
    static_assert(sizeof(Terms) == 216, "Terms"); \
    static_assert(offsetof(Terms, sinks) == 0, "Terms::sinks"); \
    static_assert(offsetof(Terms, slopes) == 8, "Terms::slopes"); \
    static_assert(offsetof(Terms, mask) == 16, "Terms::mask"); \
    static_assert(offsetof(Terms, mask_factor) == 24, "Terms::mask_factor"); \
    static_assert(offsetof(Terms, k_scale) == 32, "Terms::k_scale"); \
    static_assert(offsetof(Terms, v_scale) == 40, "Terms::v_scale"); \
    static_assert(offsetof(Terms, sink_stride) == 48, "Terms::sink_stride"); \
    static_assert(offsetof(Terms, slope_stride) == 56, "Terms::slope_stride"); \
    static_assert(offsetof(Terms, factor_stride) == 64, "Terms::factor_stride"); \
    static_assert(offsetof(Terms, mask_stride) == 72, "Terms::mask_stride"); \
    static_assert(offsetof(Terms, mask_bytes) == 104, "Terms::mask_bytes"); \
    static_assert(offsetof(Terms, k_scale_stride) == 112, "Terms::k_scale_stride"); \
    static_assert(offsetof(Terms, v_scale_stride) == 136, "Terms::v_scale_stride"); \
    static_assert(offsetof(Terms, k_scale_end) == 160, "Terms::k_scale_end"); \
    static_assert(offsetof(Terms, v_scale_end) == 168, "Terms::v_scale_end"); \
    static_assert(offsetof(Terms, page_index_head_stride) == 176, "Terms::page_index_head_stride"); \
    static_assert(offsetof(Terms, kv_position_head_stride) == 184, "Terms::kv_position_head_stride"); \
    static_assert(offsetof(Terms, mask_element) == 192, "Terms::mask_element"); \
    static_assert(offsetof(Terms, window) == 196, "Terms::window"); \
    static_assert(offsetof(Terms, softcap) == 200, "Terms::softcap"); \
    static_assert(offsetof(Terms, cap_inverse) == 204, "Terms::cap_inverse"); \
    static_assert(offsetof(Terms, k_dtype) == 208, "Terms::k_dtype"); \
    static_assert(offsetof(Terms, v_dtype) == 212, "Terms::v_dtype"); \
    static_assert(sizeof(TermsParams) == 736, "TermsParams"); \
    static_assert(offsetof(TermsParams, step) == 0, "TermsParams::step"); \
    static_assert(offsetof(TermsParams, terms) == 520, "TermsParams::terms"); \
    static_assert(sizeof(CheckParams) == 544, "CheckParams"); \
    static_assert(offsetof(CheckParams, step) == 0, "CheckParams::step"); \
    static_assert(offsetof(CheckParams, wrong) == 520, "CheckParams::wrong"); \
    static_assert(offsetof(CheckParams, first) == 528, "CheckParams::first"); \
    static_assert(offsetof(CheckParams, count) == 532, "CheckParams::count"); \
    static_assert(offsetof(CheckParams, needs_positions) == 536, "CheckParams::needs_positions"); \
    static_assert(offsetof(CheckParams, surplus_keys) == 540, "CheckParams::surplus_keys"); \
    static_assert(sizeof(QueryParams) == 168, "QueryParams"); \
    static_assert(offsetof(QueryParams, q) == 0, "QueryParams::q"); \
    static_assert(offsetof(QueryParams, gathered) == 8, "QueryParams::gathered"); \
    static_assert(offsetof(QueryParams, q_stride) == 16, "QueryParams::q_stride"); \
    static_assert(offsetof(QueryParams, first_row) == 40, "QueryParams::first_row"); \
    static_assert(offsetof(QueryParams, rows) == 48, "QueryParams::rows"); \
    static_assert(offsetof(QueryParams, tokens) == 52, "QueryParams::tokens"); \
    static_assert(offsetof(QueryParams, words) == 56, "QueryParams::words"); \
    static_assert(offsetof(QueryParams, element_bytes) == 60, "QueryParams::element_bytes"); \
    static_assert(offsetof(QueryParams, view) == 64, "QueryParams::view"); \
    static_assert(sizeof(GatherParams) == 328, "GatherParams"); \
    static_assert(offsetof(GatherParams, source) == 0, "GatherParams::source"); \
    static_assert(offsetof(GatherParams, target) == 120, "GatherParams::target"); \
    static_assert(offsetof(GatherParams, send) == 192, "GatherParams::send"); \
    static_assert(offsetof(GatherParams, received) == 200, "GatherParams::received"); \
    static_assert(offsetof(GatherParams, message_bytes) == 208, "GatherParams::message_bytes"); \
    static_assert(offsetof(GatherParams, row_bytes) == 216, "GatherParams::row_bytes"); \
    static_assert(offsetof(GatherParams, fingerprint) == 224, "GatherParams::fingerprint"); \
    static_assert(offsetof(GatherParams, words) == 232, "GatherParams::words"); \
    static_assert(offsetof(GatherParams, failed) == 240, "GatherParams::failed"); \
    static_assert(offsetof(GatherParams, host) == 248, "GatherParams::host"); \
    static_assert(offsetof(GatherParams, failure) == 256, "GatherParams::failure"); \
    static_assert(offsetof(GatherParams, arrived) == 264, "GatherParams::arrived"); \
    static_assert(offsetof(GatherParams, merged) == 272, "GatherParams::merged"); \
    static_assert(offsetof(GatherParams, senders) == 280, "GatherParams::senders"); \
    static_assert(offsetof(GatherParams, wire_dtype) == 288, "GatherParams::wire_dtype"); \
    static_assert(offsetof(GatherParams, lse_in_two) == 292, "GatherParams::lse_in_two"); \
    static_assert(offsetof(GatherParams, tokens) == 296, "GatherParams::tokens"); \
    static_assert(offsetof(GatherParams, heads) == 300, "GatherParams::heads"); \
    static_assert(offsetof(GatherParams, first_head) == 304, "GatherParams::first_head"); \
    static_assert(offsetof(GatherParams, own_heads) == 308, "GatherParams::own_heads"); \
    static_assert(offsetof(GatherParams, rank) == 312, "GatherParams::rank"); \
    static_assert(offsetof(GatherParams, world) == 316, "GatherParams::world"); \
    static_assert(offsetof(GatherParams, partials) == 320, "GatherParams::partials"); \
    static_assert(sizeof(NodeParams) == 488, "NodeParams"); \
    static_assert(offsetof(NodeParams, gather) == 0, "NodeParams::gather"); \
    static_assert(offsetof(NodeParams, view) == 328, "NodeParams::view"); \
    static_assert(offsetof(NodeParams, status) == 432, "NodeParams::status"); \
    static_assert(offsetof(NodeParams, found) == 440, "NodeParams::found"); \
    static_assert(offsetof(NodeParams, members) == 448, "NodeParams::members"); \
    static_assert(offsetof(NodeParams, arrived) == 456, "NodeParams::arrived"); \
    static_assert(offsetof(NodeParams, first_row) == 464, "NodeParams::first_row"); \
    static_assert(offsetof(NodeParams, rows) == 472, "NodeParams::rows"); \
    static_assert(offsetof(NodeParams, is_last) == 480, "NodeParams::is_last");
