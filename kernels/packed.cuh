// How rows of bytes come into shared memory for decode_packed.cu, and how bytes become f16.
#pragma once

#include "walk.cuh"

namespace treeattn {

// The lower or upper two bytes of a word as a pair of f16, exactly.
template <int32_t Type, bool Upper>
__device__ __forceinline__ uint32_t widen_bytes(uint32_t word) {
    if constexpr (Type == kF8E4M3) {
        return f16_of_e4m3<Upper>(word);
    } else if constexpr (Type == kF8E5M2) {
        // The upper half of an f16.
        return pick_bytes(word, 0, Upper ? 0x3424u : 0x1404u);
    } else {
        // 1024 + 128 + x, less 1152.
        const uint32_t biased = pick_bytes(word ^ 0x80808080u, 0x64646464u, Upper ? 0x4342u : 0x4140u);
        return add_f16(biased, 0xe480e480u);
    }
}

// A whole tile's rows of k or v, which lie at one stride.
template <int Dim, bool OfV>
__device__ __forceinline__ void copy_bytes(uint32_t to, const char* from, int64_t stride, uint64_t l2_policy) {
    using Rows = RowsOfBytes<Dim>;
    constexpr int kRows = 32 / Rows::kUnits;
    const int lane = threadIdx.x % 32, row = lane / Rows::kUnits, unit = lane % Rows::kUnits;
    from += row * stride + unit * 16;
#pragma unroll
    for (int i = 0; i < kTile; i += kRows) {
        copy_async16(to + Rows::template at<OfV>(row + i, unit), from, 16, l2_policy);
        from += kRows * stride;
    }
}
// Rows that lie anywhere: lane first_lane + r holds the address of row r. Those past the length get zeros: a zero weight does
// not silence a NaN.
template <int Dim, bool OfV>
__device__ __forceinline__ void copy_bytes_of(uint32_t to, uint64_t mine, int first_lane, int live, const char* nowhere,
                                              uint64_t l2_policy) {
    using Rows = RowsOfBytes<Dim>;
    constexpr int kRows = 32 / Rows::kUnits;
    const int lane = threadIdx.x % 32, row = lane / Rows::kUnits, unit = lane % Rows::kUnits;
#pragma unroll 1
    for (int i = 0; i < kTile; i += kRows) {
        const uint64_t from = __shfl_sync(kAllLanes, mine, first_lane + i + row);
        const bool real = row + i < live;
        copy_async16(to + Rows::template at<OfV>(row + i, unit),
                     real ? reinterpret_cast<const char*>(from) + unit * 16 : nowhere, real ? 16 : 0, l2_policy);
    }
}

// Copies the warp's next tile into a slot, and its scales; says whether a page of it does not exist.
template <class S>
__device__ __forceinline__ bool copy_packed(Walk<S>& walk, int stage, int base, int live) {
    const DecodeParams& p = walk.p;
    const Terms& t = terms_of(p);
    const int lane = walk.lane;
    const uint32_t slot = shared_address(walk.shared) + (walk.warp * S::kStages + stage) * S::kSlotBytes;
    const char *k = walk.k_row, *v = walk.v_row;  // slot 0 of a page, or the tile's first
    const int row = lane % kTile;
    int64_t outer = walk.b, inner = base + row;
    int64_t at = row;  // that row, from k and v
    bool bad = false;
    if (p.kv_layout == kStrided) {
        walk.k_row += static_cast<int64_t>(walk.step) * kTile * p.k_stride[1];
        walk.v_row += static_cast<int64_t>(walk.step) * kTile * p.v_stride[1];
    } else if (live > 0) {
        const bool regular = walk.regular();
        const int entry = walk.entries(stage)[regular ? 0 : row], page = walk.page_of(regular ? base : base + row);
        const bool outside = (regular || row < live) && (entry < 0 || entry >= p.num_pages);
        bad = __any_sync(kAllLanes, outside);
        if (bad) live = 0;
        outer = entry;
        at = inner -= static_cast<int64_t>(page) * p.page_size;
        k += outer * p.k_stride[0], v += outer * p.v_stride[0];
    }
    if (live == 0) return bad;
    if (walk.regular() && live == kTile) {
        const int64_t first = at - row;
        copy_bytes<S::kDimQk, false>(slot, k + first * p.k_stride[1], p.k_stride[1], walk.l2_policy);
        copy_bytes<S::kDimV, true>(slot + S::kVAt, v + first * p.v_stride[1], p.v_stride[1], walk.l2_policy);
    } else {
        const uint64_t mine = reinterpret_cast<uint64_t>(lane < kTile ? k + at * p.k_stride[1] : v + at * p.v_stride[1]);
        copy_bytes_of<S::kDimQk, false>(slot, mine, 0, live, walk.nowhere(), walk.l2_policy);
        copy_bytes_of<S::kDimV, true>(slot + S::kVAt, mine, kTile, live, walk.nowhere(), walk.l2_policy);
    }
    const char* scale = static_cast<const char*>(lane >= kTile ? t.v_scale : t.k_scale);
    if (scale != nullptr && row < live) {
        const int64_t* stride = lane >= kTile ? t.v_scale_stride : t.k_scale_stride;
        copy_async4(shared_address(walk.stage_memory(stage) + S::kRowsAt) + lane * 4,
                    scale + outer * stride[0] + inner * stride[1] + walk.head * stride[2]);
    }
    return bad;
}

}  // namespace treeattn
