// How rows of ggml's q8_0 and q4_0 come into shared memory for decode_blocks.cu, and how their codes become f16.
//
// A row is two or four blocks of 34 or 18 bytes: an f16 scale, then the codes of 32 elements. Its blocks begin anywhere among the
// 16-byte units that hold it, so codes are found in halfwords: of the units of a row, a lane has one or two at the same place of
// each, and takes the later unit's where the block begins after that place. Which dims those are follows from where the row
// begins, and the query lies in that order.
#pragma once

#include "walk.cuh"

namespace treeattn {

template <int32_t Type>
struct BlockCodes {
    static_assert(Type == kQ8_0 || Type == kQ4_0, "a type of blocks");
    static constexpr int kBytes = block_bytes(Type);
    // Units of codes: as many words a lane has of a block.
    static constexpr int kWords = Type == kQ8_0 ? 2 : 1;

    // The place after a block's scale, in halfwords of the unit where the scale is: kWords * block. `begin`: where the row begins.
    static __device__ __forceinline__ int first_place(int begin, int block) { return begin / 2 + block + 1; }

    // Where an element of a block is multiplied: with which of the block's two multiplies, and where in its 16 dims.
    static __device__ __forceinline__ int2 place_of(int element, int first_place) {
        if constexpr (Type == kQ8_0) {
            const int place = (element / 2 + first_place) % 8;
            return make_int2(element / 16, place / 2 * 2 + element % 2 + place % 2 * 8);
        } else {
            return make_int2(element / 16, (element % 16 / 2 + first_place) % 8 + element % 2 * 8);
        }
    }
    // The element that lane / 4 has of a block's values, the `which`-th of four.
    static __device__ __forceinline__ int element_of(int which, int first_place) {
        const int nth = (threadIdx.x % 32 / 4 + 8 - first_place) % 8;
        if constexpr (Type == kQ8_0) return which / 2 * 16 + nth * 2 + which % 2;
        return which % 2 * 16 + nth * 2 + which / 2;
    }

    // Numbers of a word, two f16: bytes 0 and 1, 2 and 3.
    static __device__ __forceinline__ uint32_t whole(uint32_t word, uint32_t which) {
        // 1024 + 128 + x, less 1152.
        return add_f16(pick_bytes(word ^ 0x80808080u, 0x64646464u, which), 0xe480e480u);
    }
    // The i-th four bits of each half.
    static __device__ __forceinline__ uint32_t nibbles(uint32_t word, int i) {
        const uint32_t x = i < 2 ? word : word >> 8;
        // 1024 + n, less 1032; 1024 + 16 n, a sixteenth of it less 72.
        if (i % 2 == 0) return add_f16(take_bits(x, 0x000f000fu, 0x64006400u), 0xe408e408u);
        return fma_f16(take_bits(x, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
    }

    // The operand of a block's multiply: of two keys' words.
    static __device__ __forceinline__ void widen_keys(uint32_t (&to)[4], const uint32_t (&first)[kWords],
                                                      const uint32_t (&second)[kWords], int nth) {
        if constexpr (Type == kQ8_0) {
            to[0] = whole(first[nth], 0x4140u), to[1] = whole(second[nth], 0x4140u);
            to[2] = whole(first[nth], 0x4342u), to[3] = whole(second[nth], 0x4342u);
        } else {
            to[0] = nibbles(first[0], nth), to[1] = nibbles(second[0], nth);
            to[2] = nibbles(first[0], nth + 2), to[3] = nibbles(second[0], nth + 2);
        }
    }
    // The same of values: words of two keys each, the first of keys 2 c and 2 c + 1.
    static __device__ __forceinline__ void widen_values(uint32_t (&to)[4], const uint32_t (&first)[kWords],
                                                        const uint32_t (&second)[kWords], int nth) {
        if constexpr (Type == kQ8_0) {
            to[0] = whole(first[nth], 0x4240u), to[1] = whole(first[nth], 0x4341u);
            to[2] = whole(second[nth], 0x4240u), to[3] = whole(second[nth], 0x4341u);
        } else {
            to[0] = nibbles(first[0], nth * 2), to[1] = nibbles(first[0], nth * 2 + 1);
            to[2] = nibbles(second[0], nth * 2), to[3] = nibbles(second[0], nth * 2 + 1);
        }
    }
};

// Where in its first unit a row of k or v of an item begins, once it lies in shared memory: that far where units are copied as
// they are, which is where all rows begin as far into one; else at 0.
__device__ __forceinline__ int row_begin(const DecodeParams& p, const Item& item, bool of_v) {
    if (p.flags & kFlagNoBulk) return 0;
    const int64_t* stride = of_v ? p.v_stride : p.k_stride;
    uint64_t at = reinterpret_cast<uint64_t>(of_v ? p.v : p.k) + item.head * stride[2];
    if (p.kv_layout == kStrided) at += item.b * stride[0];
    return static_cast<int>(at & 15);
}

// All but the last unit of a row are copied by as many lanes, which keep their unit.
template <class S>
struct LaneRows {
    using Rows = typename S::RowsK;
    static constexpr int kLanes = Rows::kUnits - 1, kRows = 32 / kLanes;  // of a row; rows an instruction
    static_assert(32 % kLanes == 0 && kTile % kRows == 0, "whole rows");

    // One of these lanes copies the last unit as well.
    static __device__ __forceinline__ void copy(uint32_t slot, const char* from, int64_t stride, uint64_t l2_policy) {
        const int lane = threadIdx.x % 32;
        const uint32_t to = slot + lane / kLanes * Rows::kPitch + lane % kLanes * 16;
#pragma unroll
        for (int i = 0; i < kTile; i += kRows) {
            copy_async16(to + i * Rows::kPitch, from, 16, l2_policy);
            if (lane % kLanes == kLanes - 1) copy_async16(to + i * Rows::kPitch + 16, from + 16, 16, l2_policy);
            from += kRows * stride;
        }
    }
};

// Where the lane copies of the rows of slot 0 of a sequence, or of a page.
template <class S>
__device__ __forceinline__ void find_lane_rows(Walk<S>& walk) {
    const DecodeParams& p = walk.p;
    constexpr int kLanes = LaneRows<S>::kLanes;
    const int row = walk.lane / kLanes, unit = walk.lane % kLanes;
    const auto find = [&](const void* data, const int64_t* stride) {
        uint64_t first = reinterpret_cast<uint64_t>(data) + walk.head * stride[2];
        if (p.kv_layout == kStrided) first += walk.b * stride[0];
        return reinterpret_cast<const char*>((first & ~15ull) + unit * 16 + row * stride[1]);
    };
    walk.k_row = find(p.k, p.k_stride), walk.v_row = find(p.v, p.v_stride);
}

// Rows that lie anywhere: lane r holds the address of row r, those of v last. Those past the length get zeros. `whole`: in the
// units that hold them; else each from where it begins.
template <class S>
static __device__ __noinline__ void copy_any_rows(const DecodeParams& p, uint32_t slot, uint64_t mine, int live, bool whole,
                                                  uint64_t l2_policy) {
    using Rows = typename S::RowsK;
    const int lane = threadIdx.x % 32;
    const char* nowhere = reinterpret_cast<const char*>(p.workspace.partials);
    if (whole) {
#pragma unroll 1
        for (int i = lane; i < 2 * kTile * Rows::kUnits; i += 32) {
            const int row = i / Rows::kUnits, unit = i - row * Rows::kUnits;
            const uint64_t from = __shfl_sync(kAllLanes, mine, row);
            const bool real = row % kTile < live;
            copy_async16(slot + i * 16, real ? reinterpret_cast<const char*>((from & ~15ull) + unit * 16) : nowhere,
                         real ? 16 : 0, l2_policy);
        }
        return;
    }
    constexpr int kPieces = Rows::kBytes / Rows::kAlign;
#pragma unroll 1
    for (int i = lane; i < 2 * kTile * kPieces; i += 32) {
        const int row = i / kPieces, at = (i - row * kPieces) * Rows::kAlign;
        const char* from = reinterpret_cast<const char*>(__shfl_sync(kAllLanes, mine, row)) + at;
        const uint32_t to = slot + row * Rows::kPitch + at;
        if (row % kTile >= live) {
#pragma unroll
            for (int n = 0; n < Rows::kAlign; n += 4) store_shared(to + n, 0);
        } else if constexpr (Rows::kAlign == 8) {
            copy_async8(to, from);
        } else {
            copy_async4(to, from);
        }
    }
}

// Copies the warp's next tile into a slot; says whether a page of it does not exist.
template <class S>
__device__ __forceinline__ bool copy_blocks(Walk<S>& walk, int stage, int base, int live) {
    const DecodeParams& p = walk.p;
    const int lane = walk.lane, row = lane % kTile;
    const uint32_t slot = shared_address(walk.shared) + (walk.warp * S::kStages + stage) * S::kSlotBytes;
    const char *k = walk.k_row, *v = walk.v_row;
    const bool regular = walk.regular(), whole = !(p.flags & kFlagNoBulk);
    int64_t outer = walk.b, inner = base + row;  // of the lane's row; lanes from 16 on: of v
    bool bad = false;
    if (p.kv_layout == kStrided) {
        k += base * p.k_stride[1], v += base * p.v_stride[1];
    } else if (live > 0) {
        const int entry = walk.entries(stage)[regular ? 0 : row], page = walk.page_of(regular ? base : base + row);
        const bool outside = (regular || row < live) && (entry < 0 || entry >= p.num_pages);
        bad = __any_sync(kAllLanes, outside);
        if (bad) live = 0;
        outer = entry;
        inner -= static_cast<int64_t>(page) * p.page_size;
        k += outer * p.k_stride[0] + (inner - row) * p.k_stride[1];
        v += outer * p.v_stride[0] + (inner - row) * p.v_stride[1];
    }
    if (live == 0) return bad;
    if (regular && live == kTile && whole) {
        LaneRows<S>::copy(slot, k, p.k_stride[1], walk.l2_policy);
        LaneRows<S>::copy(slot + S::kVAt, v, p.v_stride[1], walk.l2_policy);
    } else {
        const int64_t* stride = lane < kTile ? p.k_stride : p.v_stride;
        const uint64_t mine = reinterpret_cast<uint64_t>(lane < kTile ? p.k : p.v) + outer * stride[0] +
                              inner * stride[1] + walk.head * stride[2];
        copy_any_rows<S>(p, slot, mine, live, whole, walk.l2_policy);
    }
    return bad;
}

}  // namespace treeattn
