// The shape of the kernels for wide heads: what a block holds in shared memory, and how rows come there.
//
// All warps of a block attend the same keys, kWalkers tiles at a time (a *step*). A walker is eight warps: each copies two rows
// of every tile, and has a part of the dims of its scores. Where V is a view of K a slot holds rows of K alone.
#pragma once

#include "terms.cuh"
#include "walk.cuh"

namespace treeattn {

constexpr int kWideDimQk = 576, kWideDimV = 512;
// By how much shared memory there is.
constexpr bool kIsRoomy = kSharedLimit > 200 * 1024, kIsTight = kSharedLimit < 150 * 1024;
constexpr int kWideRows = kIsTight ? 8 : 16, kWideWalkers = kIsRoomy ? 2 : 1;

template <bool View>
struct WideShape {
    static constexpr bool kTerms = true, kWide = true, kRaw = false, kPacked = false, kInBlocks = false;
    static constexpr bool kView = View;
    static constexpr int kRows = kWideRows, kWalkers = kWideWalkers, kWarpsAWalker = 8;
    static constexpr int kWarps = kWalkers * kWarpsAWalker, kThreads = kWarps * 32, kBlocks = 1;
    static constexpr int kDimQk = kWideDimQk, kDimV = kWideDimV;
    static constexpr int kKeys = kWalkers * kTile;        // of a step
    static constexpr int kColumns = kDimV / kWarps;       // of the output, a warp's
    static constexpr int kScores = kRows * kKeys;         // of a step, a thread each
    static_assert(kScores <= kThreads && kRows % 8 == 0 && kTile * kWarpsAWalker >= kTile, "a thread a score");
    using RowsK = Rows16<kDimQk>;
    using RowsV = Rows16<View ? kDimQk : kDimV>;
    static constexpr int kVAt = View ? 0 : kTile * RowsK::kPitch;
    static constexpr int kSlotBytes = kTile * RowsK::kPitch + (View ? 0 : kTile * RowsV::kPitch);

    // The query's terms; after an item's last step its output in fp32, and what merges keep.
    static constexpr int kQueryBytes = 3 * kRows * RowsK::kPitch, kPitchO = kDimV + 4;
    static_assert(kRows * kPitchO * 4 <= kQueryBytes, "the output lies where queries were");
    // Parts of scores: of each warp its rows of 16 keys.
    static constexpr int kPartFloats = kRows * kTile, kPartsFloats = kWarpsAWalker * kPartFloats + 16;
    // Weights: rows of a step's keys, a term after the other. Eight rows' 16 bytes lie in different banks.
    static constexpr int kWeightPitch = kKeys * kHalfBytes + 16, kWeightTermBytes = kRows * kWeightPitch;
    static constexpr int kEntryBytes = kTile * 4;

    static constexpr int kRing = 0;  // walkers' slots
    static constexpr int fixed_bytes(int stages) {
        return kQueryBytes + kWalkers * kPartsFloats * 4 + 3 * kWeightTermBytes + kRows * 24 + 64 +
               kWalkers * stages * static_cast<int>(sizeof(SlotInfo)) + kWarps * stages * kEntryBytes +
               static_cast<int>(sizeof(TermsBlock<kRows>)) + static_cast<int>(sizeof(Item)) +
               kWarps * static_cast<int>(sizeof(Cursor<true>)) + static_cast<int>(sizeof(SliceScratch)) +
               static_cast<int>(sizeof(PushState)) + 128;
    }
    static constexpr bool fits(int stages) {
        return kWalkers * stages * kSlotBytes + fixed_bytes(stages) <= kSharedLimit;
    }
    static constexpr int kStages = fits(5) ? 5 : fits(4) ? 4 : fits(3) ? 3 : fits(2) ? 2 : 1;

    // Whether the next step's scores are multiplied together with this one's values: while both are in use another is on its way.
    static constexpr bool kIsAhead = kStages >= 3;

    static constexpr int kQueryAt = kWalkers * kStages * kSlotBytes;
    static constexpr int kPartsAt = kQueryAt + kQueryBytes;
    static constexpr int kWeightsAt = kPartsAt + kWalkers * kPartsFloats * 4;
    static constexpr int kTermsAt = kWeightsAt + 3 * kWeightTermBytes;
    static constexpr int kInfoAt = kTermsAt + static_cast<int>(sizeof(TermsBlock<kRows>));
    static constexpr int kEntriesAt = kInfoAt + kWalkers * kStages * static_cast<int>(sizeof(SlotInfo));
    static constexpr int kItemAt = kEntriesAt + kWarps * kStages * kEntryBytes;
    static constexpr int kCursorAt = kItemAt + static_cast<int>(sizeof(Item));
    static constexpr int kScratchAt = kCursorAt + kWarps * static_cast<int>(sizeof(Cursor<true>));
    static constexpr int kStateAt = kScratchAt + static_cast<int>(sizeof(SliceScratch));  // RowState of each row
    static constexpr int kScaleAt = kStateAt + kRows * 8;   // of each row: to log2 units
    static constexpr int kShrinkAt = kScaleAt + kRows * 4;  // what sums are multiplied by before a step's are added
    static constexpr int kSeenAt = kShrinkAt + kRows * 4;   // one bit a key of the step
    static constexpr int kFlagAt = kSeenAt + kRows * 4;
    static constexpr int kPushStateAt = (kFlagAt + 32 + 15) / 16 * 16;
    static constexpr int kSharedBytes = kPushStateAt + static_cast<int>(sizeof(PushState));
    static constexpr int kStageAt = 0, kStageBytes = 0;  // nothing comes beside rows
    static_assert(kQueryAt % 128 == 0 && kWeightsAt % 16 == 0 && kTermsAt % 16 == 0 && kInfoAt % 16 == 0 &&
                      kScratchAt % 8 == 0 && kStateAt % 8 == 0,
                  "alignment");
    static_assert(kSharedBytes <= kSharedLimit, "shared memory");

    // Where warp `part` of walker `walker` leaves its part of the score of a row and a key of its tile, in floats. Neither those
    // who write, a key or a pair of rows apart, nor those who read meet in a bank.
    static __device__ __forceinline__ int score_at(int walker, int part, int row, int key) {
        const int place = row % 8 / 2 + row % 2 * 4 + row / 8 * 8;
        return walker * kPartsFloats + part * kPartFloats + place * kTile + (key ^ place / 2 % 2 * 8);
    }
};

template <int Dim, class Rows, class S>
__device__ __forceinline__ void copy_wide_row(const Walk<S>& walk, uint32_t to, int row, const char* from, bool real,
                                              int dim) {
    from = real ? from : walk.nowhere();
#pragma unroll
    for (int i = 0; i < Dim / 8; i += 32) {
        const int unit = i + walk.lane;
        if (unit * 8 < dim) {
            copy_async16(to + Rows::at(row, unit), real ? from + unit * 16 : from, real ? 16 : 0, walk.l2_policy);
        }
    }
}

// A row that no 16-byte copy can take; zeros where there is none. Both kinds of rows change places alike.
static __device__ __noinline__ void copy_row_of_elements(uint32_t slot, uint32_t at, int row, const char* from,
                                                         int64_t stride, int dim) {
    const uint32_t base = slot + at - Rows16<kWideDimQk>::mask(row) * 16;
#pragma unroll 1
    for (int d = threadIdx.x % 32; d < dim; d += 32) {
        const uint16_t x = from == nullptr ? 0 : *reinterpret_cast<const uint16_t*>(from + d * stride);
        store_shared16(base + (d / 8 ^ Rows16<kWideDimQk>::mask(row)) * 16 + d % 8 * kHalfBytes, x);
    }
}

// Copies this warp's rows of the next tile into a slot, and zeros for those that there are not: a zero weight does not silence a
// NaN. Says whether a page of the tile does not exist.
template <class S>
__device__ __forceinline__ bool copy_wide(Walk<S>& walk, int stage, int base, int live) {
    const DecodeParams& p = walk.p;
    const int lane = walk.lane, own = walk.warp % S::kWarpsAWalker;
    const uint32_t slot = shared_address(walk.shared) + (walk.walker() * S::kStages + stage) * S::kSlotBytes;
    const bool is_strided = p.kv_layout == kStrided;
    bool bad = false;
    if (!is_strided && live > 0) {
        const int entry = walk.entries(stage)[walk.regular() ? 0 : lane % kTile];
        bad = __any_sync(kAllLanes, lane % kTile < live && (entry < 0 || entry >= p.num_pages));
        if (bad) live = 0;
    }
#pragma unroll
    for (int i = 0; i < kTile / S::kWarpsAWalker; i++) {
        const int row = own + i * S::kWarpsAWalker;
        const char* k = walk.k_row;
        const char* v = walk.v_row;
        if (is_strided) {
            k += row * p.k_stride[1], v += row * p.v_stride[1];
        } else if (row < live) {
            const int page = walk.page_of(base + row), entry = walk.entries(stage)[walk.regular() ? 0 : row];
            const int64_t inner = base + row - page * p.page_size;
            k += entry * p.k_stride[0] + inner * p.k_stride[1];
            v += entry * p.v_stride[0] + inner * p.v_stride[1];
        }
        if (p.flags & kFlagNoBulk) {
            copy_row_of_elements(slot, S::RowsK::at(row, 0), row, row < live ? k : nullptr, p.k_stride[3], p.head_dim_qk);
            if constexpr (!S::kView) {
                copy_row_of_elements(slot + S::kVAt, S::RowsV::at(row, 0), row, row < live ? v : nullptr, p.v_stride[3],
                                     p.head_dim_v());
            }
            continue;
        }
        copy_wide_row<S::kDimQk, typename S::RowsK>(walk, slot, row, k, row < live, p.head_dim_qk);
        if constexpr (!S::kView) {
            copy_wide_row<S::kDimV, typename S::RowsV>(walk, slot + S::kVAt, row, v, row < live, p.head_dim_v());
        }
    }
    if (is_strided) {
        walk.k_row += static_cast<int64_t>(walk.step) * kTile * p.k_stride[1];
        walk.v_row += static_cast<int64_t>(walk.step) * kTile * p.v_stride[1];
    }
    return bad;
}

// Dims between a head's and the class hold zeros in K, against zeros of q. Values past the last column are nobody's.
template <class S>
__device__ __forceinline__ void clear_wide_padding(const DecodeParams& p, uint32_t slot) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 % S::kWarpsAWalker;
#pragma unroll 1
    for (int row = own; row < kTile; row += S::kWarpsAWalker) {
#pragma unroll 1
        for (int unit = p.head_dim_qk / 8 + lane; unit < S::kDimQk / 8; unit += 32) {
            clear_shared(slot + S::RowsK::at(row, unit));
        }
    }
}

}  // namespace treeattn
