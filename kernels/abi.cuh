// Generated from src/cuda/abi.rs: TREEATTN_BLESS=1 cargo test --lib abi writes it anew.
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
// Blocks of merges and exchanges, the grid's partials, and what exchange_rows serves, as src/cuda/params.rs says.
enum : int {
    kRowsABlock = 8,
    kRowThreads = 256,
    kExchangeBlocksAUnit = 2,
    kRowsMostRanks = 8,
    kRowsMostWords = 128,
    kTile = 16,
    kPartialsABlock = 4,
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

// The hashes of what all kernels know, and of what those that take TermsParams, CheckParams or GatherParams do; each image carries its own.
constexpr uint64_t kAbi = 0x21236fe8735fe64f;
constexpr uint64_t kTermsAbi = 0xb1b401aa4b9683e5;
constexpr uint64_t kCheckAbi = 0x07e78c6c6d4be5d4;
constexpr uint64_t kGatherAbi = 0xcc99294f4a190833;

}  // namespace treeattn

// Once in each kernels/NAME.cu: the image's word that it was compiled from this.
#define TREEATTN_ABI(NAME) extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kAbi;
#define TREEATTN_TERMS_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kTermsAbi;
#define TREEATTN_CHECK_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kCheckAbi;
#define TREEATTN_GATHER_ABI(NAME) \
    extern "C" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kGatherAbi;

#define TREEATTN_CHECK_LAYOUT \
    static_assert(sizeof(KernelShape) == 32, "KernelShape"); \
    static_assert(offsetof(KernelShape, threads) == 0, "KernelShape::threads"); \
    static_assert(offsetof(KernelShape, dynamic_smem) == 4, "KernelShape::dynamic_smem"); \
    static_assert(offsetof(KernelShape, blocks_per_sm) == 8, "KernelShape::blocks_per_sm"); \
    static_assert(offsetof(KernelShape, partial_bytes) == 12, "KernelShape::partial_bytes"); \
    static_assert(offsetof(KernelShape, counters) == 16, "KernelShape::counters"); \
    static_assert(offsetof(KernelShape, rows) == 20, "KernelShape::rows"); \
    static_assert(offsetof(KernelShape, open_tiles) == 24, "KernelShape::open_tiles"); \
    static_assert(offsetof(KernelShape, long_bytes) == 28, "KernelShape::long_bytes"); \
    static_assert(sizeof(Workspace) == 32, "Workspace"); \
    static_assert(offsetof(Workspace, partials) == 0, "Workspace::partials"); \
    static_assert(offsetof(Workspace, counters) == 8, "Workspace::counters"); \
    static_assert(offsetof(Workspace, status) == 16, "Workspace::status"); \
    static_assert(offsetof(Workspace, found) == 24, "Workspace::found"); \
    static_assert(sizeof(RowTarget) == 64, "RowTarget"); \
    static_assert(offsetof(RowTarget, o) == 0, "RowTarget::o"); \
    static_assert(offsetof(RowTarget, lse) == 8, "RowTarget::lse"); \
    static_assert(offsetof(RowTarget, o_stride) == 16, "RowTarget::o_stride"); \
    static_assert(offsetof(RowTarget, lse_stride) == 40, "RowTarget::lse_stride"); \
    static_assert(offsetof(RowTarget, dtype) == 56, "RowTarget::dtype"); \
    static_assert(offsetof(RowTarget, dim) == 60, "RowTarget::dim"); \
    static_assert(sizeof(RowSource) == 72, "RowSource"); \
    static_assert(offsetof(RowSource, o) == 0, "RowSource::o"); \
    static_assert(offsetof(RowSource, lse) == 8, "RowSource::lse"); \
    static_assert(offsetof(RowSource, o_stride) == 16, "RowSource::o_stride"); \
    static_assert(offsetof(RowSource, lse_stride) == 40, "RowSource::lse_stride"); \
    static_assert(offsetof(RowSource, dtype) == 56, "RowSource::dtype"); \
    static_assert(offsetof(RowSource, dim) == 60, "RowSource::dim"); \
    static_assert(offsetof(RowSource, to_natural) == 64, "RowSource::to_natural"); \
    static_assert(offsetof(RowSource, plus_inf_is_empty) == 68, "RowSource::plus_inf_is_empty"); \
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
    static_assert(sizeof(DecodeParams) == 512, "DecodeParams"); \
    static_assert(offsetof(DecodeParams, q) == 0, "DecodeParams::q"); \
    static_assert(offsetof(DecodeParams, k) == 8, "DecodeParams::k"); \
    static_assert(offsetof(DecodeParams, v) == 16, "DecodeParams::v"); \
    static_assert(offsetof(DecodeParams, q_stride) == 24, "DecodeParams::q_stride"); \
    static_assert(offsetof(DecodeParams, k_stride) == 48, "DecodeParams::k_stride"); \
    static_assert(offsetof(DecodeParams, v_stride) == 80, "DecodeParams::v_stride"); \
    static_assert(offsetof(DecodeParams, target) == 112, "DecodeParams::target"); \
    static_assert(offsetof(DecodeParams, query_start) == 176, "DecodeParams::query_start"); \
    static_assert(offsetof(DecodeParams, kv_length) == 184, "DecodeParams::kv_length"); \
    static_assert(offsetof(DecodeParams, global_length) == 192, "DecodeParams::global_length"); \
    static_assert(offsetof(DecodeParams, kv_start) == 200, "DecodeParams::kv_start"); \
    static_assert(offsetof(DecodeParams, kv_position) == 208, "DecodeParams::kv_position"); \
    static_assert(offsetof(DecodeParams, query_position) == 216, "DecodeParams::query_position"); \
    static_assert(offsetof(DecodeParams, block_table) == 224, "DecodeParams::block_table"); \
    static_assert(offsetof(DecodeParams, page_indptr) == 232, "DecodeParams::page_indptr"); \
    static_assert(offsetof(DecodeParams, page_indices) == 240, "DecodeParams::page_indices"); \
    static_assert(offsetof(DecodeParams, last_page_len) == 248, "DecodeParams::last_page_len"); \
    static_assert(offsetof(DecodeParams, kv_position_stride) == 256, "DecodeParams::kv_position_stride"); \
    static_assert(offsetof(DecodeParams, block_table_stride) == 264, "DecodeParams::block_table_stride"); \
    static_assert(offsetof(DecodeParams, num_page_indices) == 272, "DecodeParams::num_page_indices"); \
    static_assert(offsetof(DecodeParams, kv_capacity) == 280, "DecodeParams::kv_capacity"); \
    static_assert(offsetof(DecodeParams, k_end) == 288, "DecodeParams::k_end"); \
    static_assert(offsetof(DecodeParams, v_end) == 296, "DecodeParams::v_end"); \
    static_assert(offsetof(DecodeParams, batch) == 304, "DecodeParams::batch"); \
    static_assert(offsetof(DecodeParams, query_tokens) == 308, "DecodeParams::query_tokens"); \
    static_assert(offsetof(DecodeParams, q_heads) == 312, "DecodeParams::q_heads"); \
    static_assert(offsetof(DecodeParams, kv_heads) == 316, "DecodeParams::kv_heads"); \
    static_assert(offsetof(DecodeParams, group) == 320, "DecodeParams::group"); \
    static_assert(offsetof(DecodeParams, head_dim_qk) == 324, "DecodeParams::head_dim_qk"); \
    static_assert(offsetof(DecodeParams, q_dtype) == 328, "DecodeParams::q_dtype"); \
    static_assert(offsetof(DecodeParams, kv_layout) == 332, "DecodeParams::kv_layout"); \
    static_assert(offsetof(DecodeParams, page_size) == 336, "DecodeParams::page_size"); \
    static_assert(offsetof(DecodeParams, num_pages) == 340, "DecodeParams::num_pages"); \
    static_assert(offsetof(DecodeParams, placement) == 344, "DecodeParams::placement"); \
    static_assert(offsetof(DecodeParams, interleave) == 348, "DecodeParams::interleave"); \
    static_assert(offsetof(DecodeParams, rank) == 352, "DecodeParams::rank"); \
    static_assert(offsetof(DecodeParams, world) == 356, "DecodeParams::world"); \
    static_assert(offsetof(DecodeParams, scale) == 360, "DecodeParams::scale"); \
    static_assert(offsetof(DecodeParams, flags) == 364, "DecodeParams::flags"); \
    static_assert(offsetof(DecodeParams, waiting) == 368, "DecodeParams::waiting"); \
    static_assert(offsetof(DecodeParams, workspace) == 376, "DecodeParams::workspace"); \
    static_assert(offsetof(DecodeParams, exchange) == 408, "DecodeParams::exchange"); \
    static_assert(sizeof(MergeParams) == 168, "MergeParams"); \
    static_assert(offsetof(MergeParams, source) == 0, "MergeParams::source"); \
    static_assert(offsetof(MergeParams, target) == 72, "MergeParams::target"); \
    static_assert(offsetof(MergeParams, step) == 136, "MergeParams::step"); \
    static_assert(offsetof(MergeParams, partials) == 152, "MergeParams::partials"); \
    static_assert(offsetof(MergeParams, tokens) == 156, "MergeParams::tokens"); \
    static_assert(offsetof(MergeParams, heads) == 160, "MergeParams::heads"); \
    static_assert(sizeof(ExchangeParams) == 272, "ExchangeParams"); \
    static_assert(offsetof(ExchangeParams, source) == 0, "ExchangeParams::source"); \
    static_assert(offsetof(ExchangeParams, target) == 72, "ExchangeParams::target"); \
    static_assert(offsetof(ExchangeParams, first_row) == 136, "ExchangeParams::first_row"); \
    static_assert(offsetof(ExchangeParams, rows) == 144, "ExchangeParams::rows"); \
    static_assert(offsetof(ExchangeParams, is_pushed) == 152, "ExchangeParams::is_pushed"); \
    static_assert(offsetof(ExchangeParams, is_last) == 156, "ExchangeParams::is_last"); \
    static_assert(offsetof(ExchangeParams, waiting) == 160, "ExchangeParams::waiting"); \
    static_assert(offsetof(ExchangeParams, lse_in_two) == 164, "ExchangeParams::lse_in_two"); \
    static_assert(offsetof(ExchangeParams, view) == 168, "ExchangeParams::view"); \
    static_assert(sizeof(AllreduceParams) == 168, "AllreduceParams"); \
    static_assert(offsetof(AllreduceParams, o) == 0, "AllreduceParams::o"); \
    static_assert(offsetof(AllreduceParams, lse) == 8, "AllreduceParams::lse"); \
    static_assert(offsetof(AllreduceParams, most) == 16, "AllreduceParams::most"); \
    static_assert(offsetof(AllreduceParams, weights) == 24, "AllreduceParams::weights"); \
    static_assert(offsetof(AllreduceParams, target) == 32, "AllreduceParams::target"); \
    static_assert(offsetof(AllreduceParams, status) == 96, "AllreduceParams::status"); \
    static_assert(offsetof(AllreduceParams, words) == 104, "AllreduceParams::words"); \
    static_assert(offsetof(AllreduceParams, failed) == 112, "AllreduceParams::failed"); \
    static_assert(offsetof(AllreduceParams, host) == 120, "AllreduceParams::host"); \
    static_assert(offsetof(AllreduceParams, arrived) == 128, "AllreduceParams::arrived"); \
    static_assert(offsetof(AllreduceParams, tokens) == 136, "AllreduceParams::tokens"); \
    static_assert(offsetof(AllreduceParams, heads) == 140, "AllreduceParams::heads"); \
    static_assert(offsetof(AllreduceParams, head_dim) == 144, "AllreduceParams::head_dim"); \
    static_assert(offsetof(AllreduceParams, first_head) == 148, "AllreduceParams::first_head"); \
    static_assert(offsetof(AllreduceParams, own_heads) == 152, "AllreduceParams::own_heads"); \
    static_assert(offsetof(AllreduceParams, rank) == 156, "AllreduceParams::rank"); \
    static_assert(offsetof(AllreduceParams, world) == 160, "AllreduceParams::world"); \
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
    static_assert(sizeof(TermsParams) == 728, "TermsParams"); \
    static_assert(offsetof(TermsParams, step) == 0, "TermsParams::step"); \
    static_assert(offsetof(TermsParams, terms) == 512, "TermsParams::terms"); \
    static_assert(sizeof(CheckParams) == 536, "CheckParams"); \
    static_assert(offsetof(CheckParams, step) == 0, "CheckParams::step"); \
    static_assert(offsetof(CheckParams, wrong) == 512, "CheckParams::wrong"); \
    static_assert(offsetof(CheckParams, first) == 520, "CheckParams::first"); \
    static_assert(offsetof(CheckParams, count) == 524, "CheckParams::count"); \
    static_assert(offsetof(CheckParams, needs_positions) == 528, "CheckParams::needs_positions"); \
    static_assert(offsetof(CheckParams, surplus_keys) == 532, "CheckParams::surplus_keys"); \
    static_assert(sizeof(GatherParams) == 272, "GatherParams"); \
    static_assert(offsetof(GatherParams, source) == 0, "GatherParams::source"); \
    static_assert(offsetof(GatherParams, target) == 72, "GatherParams::target"); \
    static_assert(offsetof(GatherParams, send) == 136, "GatherParams::send"); \
    static_assert(offsetof(GatherParams, received) == 144, "GatherParams::received"); \
    static_assert(offsetof(GatherParams, message_bytes) == 152, "GatherParams::message_bytes"); \
    static_assert(offsetof(GatherParams, row_bytes) == 160, "GatherParams::row_bytes"); \
    static_assert(offsetof(GatherParams, fingerprint) == 168, "GatherParams::fingerprint"); \
    static_assert(offsetof(GatherParams, words) == 176, "GatherParams::words"); \
    static_assert(offsetof(GatherParams, failed) == 184, "GatherParams::failed"); \
    static_assert(offsetof(GatherParams, host) == 192, "GatherParams::host"); \
    static_assert(offsetof(GatherParams, failure) == 200, "GatherParams::failure"); \
    static_assert(offsetof(GatherParams, arrived) == 208, "GatherParams::arrived"); \
    static_assert(offsetof(GatherParams, merged) == 216, "GatherParams::merged"); \
    static_assert(offsetof(GatherParams, senders) == 224, "GatherParams::senders"); \
    static_assert(offsetof(GatherParams, wire_dtype) == 232, "GatherParams::wire_dtype"); \
    static_assert(offsetof(GatherParams, lse_in_two) == 236, "GatherParams::lse_in_two"); \
    static_assert(offsetof(GatherParams, tokens) == 240, "GatherParams::tokens"); \
    static_assert(offsetof(GatherParams, heads) == 244, "GatherParams::heads"); \
    static_assert(offsetof(GatherParams, first_head) == 248, "GatherParams::first_head"); \
    static_assert(offsetof(GatherParams, own_heads) == 252, "GatherParams::own_heads"); \
    static_assert(offsetof(GatherParams, rank) == 256, "GatherParams::rank"); \
    static_assert(offsetof(GatherParams, world) == 260, "GatherParams::world"); \
    static_assert(offsetof(GatherParams, partials) == 264, "GatherParams::partials"); \
    static_assert(sizeof(NodeParams) == 432, "NodeParams"); \
    static_assert(offsetof(NodeParams, gather) == 0, "NodeParams::gather"); \
    static_assert(offsetof(NodeParams, view) == 272, "NodeParams::view"); \
    static_assert(offsetof(NodeParams, status) == 376, "NodeParams::status"); \
    static_assert(offsetof(NodeParams, found) == 384, "NodeParams::found"); \
    static_assert(offsetof(NodeParams, members) == 392, "NodeParams::members"); \
    static_assert(offsetof(NodeParams, arrived) == 400, "NodeParams::arrived"); \
    static_assert(offsetof(NodeParams, first_row) == 408, "NodeParams::first_row"); \
    static_assert(offsetof(NodeParams, rows) == 416, "NodeParams::rows"); \
    static_assert(offsetof(NodeParams, is_last) == 424, "NodeParams::is_last");
