// From a tile's products to weights, in kernels that know terms: what positions and masks hide, what is added, caps, maxima.
#pragma once

#include "schedule.cuh"

namespace treeattn {

// The slots that all rows of an item see, masks aside: none where explicit positions count.
struct SeenByAll {
    int low, high;

    template <class S>
    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        const auto& block = *reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt);
        const RowTerms& row = block.rows[threadIdx.x % S::kRows];
        static_assert(S::kRows == 8, "rows of eight lanes");
        low = row.seen.low, high = row.seen.high;
#pragma unroll
        for (int d = 1; d < S::kRows; d *= 2) {
            low = max(low, __shfl_xor_sync(kAllLanes, low, d)), high = min(high, __shfl_xor_sync(kAllLanes, high, d));
        }
        if (p.placement == kExplicit && needs_positions<true>(p)) low = INT32_MAX;
    }
};

// Reports that one of a tile's keys has a negative position, with explicit placement.
template <class S>
__device__ __forceinline__ void report_positions(const DecodeParams& p, const Tile& tile, const char* shared) {
    const int32_t* const positions = reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt)->item.positions;
    report_position(p, tile.b, positions - p.kv_position + tile.base, tile.keys);
}

// What a tile's scores get beside their products. [row tile][half * 2 + row of the lane], as the scores.
template <int RowTiles>
struct TileTerms {
    float slope[RowTiles][2];     // in log2 units; 0: none
    float distance[RowTiles][4];  // from the query token, where there are slopes
    float bias[RowTiles][4];      // of the mask
    uint32_t seen;                // one bit a score: t * 4 + half * 2 + row
    bool bad_position;
};

// What the mask hides, and adds, of the keys of a lane, `first` and first + 8. Elements of rows that there are not are anything,
// those of keys that are hidden anyway are not read.
template <class S, int RowTiles>
__device__ __forceinline__ void add_mask(TileTerms<RowTiles>& out, const DecodeParams& p, int first, const char* shared,
                                         const char* stage) {
    const auto& block = *reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt);
    const Terms& t = terms_of(p);
    const int lane = threadIdx.x % 32, size = mask_element_bytes(t.mask_element);
    const bool is_staged = mask_is_staged(t);
    uint32_t element[RowTiles][4];
#pragma unroll
    for (int n = 0; n < RowTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = n * 8 + lane % 4 * 2 + i % 2, key = i / 2 * 8;
            element[n][i] = 0;
            const char* at = stage + (r * kTile + lane / 4 + key) * size;
            if (!is_staged) {
                const char* row = block.rows[r].mask;
                at = row + (first + key) * t.mask_stride[3];
                // As if it hid nothing.
                if (row == nullptr) element[n][i] = t.mask_element == kMaskByte;
                if (row == nullptr || !(out.seen >> (n * 4 + i) & 1)) continue;
            }
            if (t.mask_element == kMaskF16) {
                element[n][i] = __float_as_uint(unpack_pair<false>(*reinterpret_cast<const uint16_t*>(at)).x);
            } else if (t.mask_element == kMaskF32) {
                element[n][i] = *reinterpret_cast<const uint32_t*>(at);
            } else {
                element[n][i] = *reinterpret_cast<const uint8_t*>(at);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < RowTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = __uint_as_float(element[n][i]);
            const bool sees = t.mask_element == kMaskByte ? element[n][i] != 0 : x != -infinity();
            if (!sees) out.seen &= ~(1u << (n * 4 + i));
            // A bias of what is hidden is never looked at; bytes are numbers next to 0.
            const float factor = block.rows[n * 8 + lane % 4 * 2 + i % 2].factor;
            out.bias[n][i] = t.mask_element == kMaskByte ? 0.f : factor * x;
        }
    }
}

// `stage`: what came with the tile beside its rows.
template <class S, int RowTiles, class T>
__device__ __forceinline__ TileTerms<RowTiles> ask_terms(const DecodeParams& p, const SeenByAll& all, const T& tile,
                                                         const char* shared, const char* stage) {
    const auto& block = *reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt);
    const Terms& t = terms_of(p);
    const int lane = threadIdx.x % 32, first = tile.base + lane / 4;
    TileTerms<RowTiles> out;
    out.seen = RowTiles == 1 ? 0xfu : 0xffu;
    out.bad_position = false;
#pragma unroll
    for (int n = 0; n < RowTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out.slope[n][i % 2] = out.distance[n][i] = out.bias[n][i] = 0.f;
    }
    const bool by_position = p.placement == kExplicit && needs_positions<true>(p);
    int position[2] = {first, first + 8};
    if (by_position) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int slot = position[half];
            if (slot < tile.base + tile.keys) position[half] = block.item.positions[slot];
            out.bad_position |= position[half] < 0;
        }
    } else if (t.slopes != nullptr && p.placement == kInterleaved) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int slot = position[half], run = p.interleave, nth = slot / run;
            position[half] = static_cast<int>((static_cast<int64_t>(nth) * p.world + p.rank) * run + (slot - nth * run));
        }
    }
    if (t.slopes != nullptr) {
#pragma unroll
        for (int n = 0; n < RowTiles; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const RowTerms& row = block.rows[n * 8 + lane % 4 * 2 + i];
                out.slope[n][i] = row.slope;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    out.distance[n][half * 2 + i] = fabsf(static_cast<float>(row.position - position[half]));
                }
            }
        }
    }
    // Most tiles are seen whole.
    if (tile.keys < kTile || tile.base < all.low || tile.base + (kTile - 1) > all.high) {
        out.seen = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int place = by_position ? position[half] : first + half * 8;
            const bool live = first + half * 8 < tile.base + tile.keys;
#pragma unroll
            for (int n = 0; n < RowTiles; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const RowTerms& row = block.rows[n * 8 + lane % 4 * 2 + i];
                    const bool sees = live && place <= row.seen.high && place >= row.seen.low;
                    out.seen |= static_cast<uint32_t>(sees) << (n * 4 + half * 2 + i);
                }
            }
        }
    }
    if (t.mask_element != kMaskNone) add_mask<S, RowTiles>(out, p, first, shared, stage);
    return out;
}

// tanh within 2 units in the last place, without a branch.
__device__ __forceinline__ float tanh_of(float x) {
    const float size = fabsf(x), square = x * x;
    float series = fmaf(square, 0x1.01e104p-6f, -0x1.ac795cp-5f);
    series = fmaf(square, series, 0x1.10b282p-3f);
    series = fmaf(square, series, -0x1.5553dap-2f);
    const float small = fmaf(square * series, x, x);
    const float large = fmaf(-2.f, __fdividef(1.f, exp2_approx(2.f * kLog2E * size) + 1.f), 1.f);
    return size < 0.6f ? small : copysignf(large, x);
}

// Turns the products s of a tile with its keys into weights x against a family's running maxima, and adds them to its sums of this
// lane's keys. scale: of products, to log2 units.
template <int RowTiles, class Family>
__device__ __forceinline__ void weigh_tile(const DecodeParams& p, const TileTerms<RowTiles>& terms,
                                           const float (&scale)[RowTiles][2], float (&s)[RowTiles][4],
                                           float (&x)[RowTiles][4], Family& family) {
    const Terms& t = terms_of(p);
    float factor[RowTiles][2];
#pragma unroll
    for (int n = 0; n < RowTiles; n++) factor[n][0] = scale[n][0], factor[n][1] = scale[n][1];
    if (t.softcap > 0.f) {
#pragma unroll
        for (int n = 0; n < RowTiles; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = t.softcap * tanh_of(s[n][i] * (factor[n][i % 2] * t.cap_inverse));
            factor[n][0] = factor[n][1] = kLog2E;
        }
    }
#pragma unroll
    for (int n = 0; n < RowTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A hidden score becomes -inf, whatever it was.
            const float added = fmaf(-terms.slope[n][i % 2], terms.distance[n][i], terms.bias[n][i]);
            x[n][i] = terms.seen >> (n * 4 + i) & 1 ? fmaf(s[n][i], factor[n][i % 2], added) : -infinity();
        }
    }
    family.keep_maxima(x);
#pragma unroll
    for (int n = 0; n < RowTiles; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float reference = family.m[n][i];
            const bool coarse = fabsf(reference) >= kCoarse;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = half * 2 + i;
                // Summed unrounded, except where the rounding of a score is so coarse that the largest would be far from its
                // own maximum.
                const float added = fmaf(-terms.slope[n][i], terms.distance[n][at], terms.bias[n][at] - reference);
                float power = fmaf(s[n][at], factor[n][i], added);
                if (coarse) power = x[n][at] - reference;
                x[n][at] = terms.seen >> (n * 4 + at) & 1 ? exp2_approx(power) : 0.f;
            }
            family.l[n][i] += x[n][i] + x[n][2 + i];
        }
    }
}

}  // namespace treeattn
