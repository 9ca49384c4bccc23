// Decode on tensor cores: 8 or 16 packed query rows a tile, warps split over keys.
//
// A running maximum is rounded up to a whole number, in log2 units: it moves seldom then, and what sums are rescaled by
// rounds nothing. A tile only has to see that none of its scores is larger; lanes agree on a maximum where one is.
//
// Scores are exact products summed in fp32. A q of another type than k is split into up to three 16-bit terms that add
// up to it, one pass over K each. Weights are split in two or three 16-bit terms likewise, so that nothing but fp32
// rounding is lost. Every product starts from zero and is added to the sum by an fp32 addition: tensor cores truncate
// their sums, and a long sum that is truncated at each step drifts.
#pragma once

#include "decode.cuh"

namespace treeattn {

constexpr int kQueryParts = 3;
// 16-bit floats underflow below 2^-24: f16 weights carry 2^15, so that a weight of 2^-39 still counts.
constexpr float kHalfBias = 32768.f;

template <int HeadDimQk, int HeadDimV, int Rows, bool Bf16K, bool Bf16V, bool Terms = false,
          class Slot = Slot16<HeadDimQk, HeadDimV>>
struct Mma {
    static constexpr int kPitchQ = HeadDimQk * kHalfBytes + 16;
    static constexpr int kPartBytes = Rows * kPitchQ;
    static constexpr int kTermsBytes = Terms ? static_cast<int>(sizeof(TermsBlock<Rows>)) : 0;
    using S = Shape<HeadDimQk, HeadDimV, Rows, kQueryParts * kPartBytes + kTermsBytes, Terms, Slot>;
    // Three bf16 terms hold 24 bits; two f16 terms hold 22, which is enough with the bias.
    static constexpr int kWeightParts = Bf16V ? 3 : 2;
    // Keys and dims take the 16-wide side of the multiply, query rows the 8-wide one: S^T = K Q^T, O^T = V^T P^T.
    // Eight rows then cost half of what a 16-row A operand would, in instructions and registers.
    static constexpr int kRowTiles = Rows / 8;
    static constexpr int kStepsQk = HeadDimQk / 16, kStepsV = HeadDimV / 16;

    // This lane's rows of row tile t are 8 t + 2 (lane % 4) + {0, 1}; its keys lane / 4 + {0, 8}; its dims of step n
    // 16 n + lane / 4 + {0, 8}. o[t][n]: {dim, row} = 00, 01, 10, 11.
    float o[kRowTiles][kStepsV][4];
    float m[kRowTiles][2], l[kRowTiles][2];  // l of this lane's keys only
    int least_bound;

    static constexpr int kKType = Bf16K ? kBf16 : kF16;

    static __device__ __forceinline__ int query_parts(const DecodeParams& p) {
        if (p.q_dtype == kKType) return 1;
        if (p.q_dtype == kF32) return 3;
        return Bf16K ? 2 : 1;
    }

    // Splits x exactly: term by term, the rest each time.
    static __device__ __forceinline__ uint32_t take_term(float& x, float& y) {
        if constexpr (Bf16K) {
            // Truncated, so that no finite number becomes infinite; a NaN keeps a mantissa bit.
            const uint32_t xb = __float_as_uint(x), yb = __float_as_uint(y);
            const uint32_t xt = x != x ? 0x7fff0000u : xb & 0xffff0000u;
            const uint32_t yt = y != y ? 0x7fff0000u : yb & 0xffff0000u;
            x = isfinite(x) ? x - __uint_as_float(xt) : 0.f;
            y = isfinite(y) ? y - __uint_as_float(yt) : 0.f;
            return xt >> 16 | yt;
        } else {
            const uint32_t bits = pack_pair<false>(x, y);
            const float2 back = unpack_pair<false>(bits);
            x = isfinite(back.x) ? x - back.x : 0.f;
            y = isfinite(back.y) ? y - back.y : 0.f;
            return bits;
        }
    }

    // Writes the item's query tile to shared memory, one warp a row.
    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        const int lane = threadIdx.x % 32;
        int* bounds = reinterpret_cast<int*>(shared + S::kRowAt);
        float* scales = reinterpret_cast<float*>(bounds + Rows);
        const bool plain = p.q_dtype == kKType && p.q_stride[2] == 2 &&
                           ((reinterpret_cast<uintptr_t>(p.q) | p.q_stride[0] | p.q_stride[1]) & 15) == 0;
#pragma unroll 1
        for (int row = threadIdx.x / 32; row < Rows; row += S::kWarps) {
            const int packed = item.row_tile * Rows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            const char* from =
                static_cast<const char*>(p.q) + (item.first_token + token) * p.q_stride[0] + head * p.q_stride[1];
            const bool live = row < rows;
            float row_scale = 1.f;
            if (plain) {
                uint4 bits = make_uint4(0, 0, 0, 0);
                if (live && lane * 8 < p.head_dim_qk) bits = *reinterpret_cast<const uint4*>(from + lane * 16);
                if (lane * 8 < HeadDimQk) {
                    *reinterpret_cast<uint4*>(shared + S::kQueryAt + row * kPitchQ + lane * 16) = bits;
                }
            } else {
                row_scale = stage_terms(p, live ? from : nullptr, shared + S::kQueryAt + row * kPitchQ);
            }
            if (lane == 0) {
                bounds[row] = live ? last_visible(p, item.b, item.first_token, item.tokens, token) : INT32_MAX;
                scales[row] = live ? p.scale * kLog2E * row_scale : 0.f;
            }
        }
    }

    // Eight neighbours a lane of a row of the query, into the range of the type of k; zeros where there is no row. Gives the power
    // of two that the scores lack.
    static __device__ __forceinline__ float load_query(const DecodeParams& p, const char* from, float (&x)[8]) {
        const int lane = threadIdx.x % 32;
        float row_scale = 1.f;
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = 0.f;
        if (from != nullptr && lane * 8 < p.head_dim_qk) {
            load_eight(x, from + lane * 8 * p.q_stride[2], p.q_stride[2], p.q_dtype);
        }
        if (!Bf16K && p.q_dtype != kF16) {
            // Into f16's range.
            float top = 0.f;
#pragma unroll
            for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
            for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
            if (top > 0.f && isfinite(top)) {
                const int exponent = max(ilogbf(top) - 14, -126);
                row_scale = ldexpf(1.f, exponent);
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = ldexpf(x[i], -exponent);
            }
        }
        return row_scale;
    }

    // A row of another type or at odd strides, as terms of the type of k. Gives the power of two that the scores lack.
    static __device__ __noinline__ float stage_terms(const DecodeParams& p, const char* from, char* to) {
        const int lane = threadIdx.x % 32;
        float x[8];
        const float row_scale = load_query(p, from, x);
        const int terms = query_parts(p);
#pragma unroll 1
        for (int part = 0; part < terms; part++) {
            const uint4 bits = make_uint4(take_term(x[0], x[1]), take_term(x[2], x[3]), take_term(x[4], x[5]),
                                          take_term(x[6], x[7]));
            if (lane * 8 < HeadDimQk) *reinterpret_cast<uint4*>(to + part * kPartBytes + lane * 16) = bits;
        }
        return row_scale;
    }

    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        const int lane = threadIdx.x % 32;
        const int* bounds = reinterpret_cast<const int*>(shared + S::kRowAt);
        least_bound = INT32_MAX;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                m[t][i] = kNoMaximum;
                l[t][i] = 0.f;
                least_bound = min(least_bound, bounds[t * 8 + lane % 4 * 2 + i]);
            }
#pragma unroll
            for (int n = 0; n < kStepsV; n++) o[t][n][0] = o[t][n][1] = o[t][n][2] = o[t][n][3] = 0.f;
        }
        least_bound = min(least_bound, __shfl_xor_sync(kAllLanes, least_bound, 1));
        least_bound = min(least_bound, __shfl_xor_sync(kAllLanes, least_bound, 2));
    }

    static __device__ __forceinline__ void scores(const DecodeParams& p, float (&s)[kRowTiles][4], const char* shared,
                                                  uint32_t slot) {
        const int lane = threadIdx.x % 32;
        const uint32_t k_address = slot + S::RowsK::at(lane % 16, lane / 16);
        const uint32_t q_address = shared_address(shared + S::kQueryAt) + lane % 8 * kPitchQ + lane / 8 * 16;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0.f;
        // Small terms first.
#pragma unroll 1
        for (int part = query_parts(p) - 1; part >= 0; part--) {
#pragma unroll
            for (int step = 0; step < kStepsQk; step += 2) {
                uint32_t k0[4], k1[4];
                load_matrices(k0, S::RowsK::step(k_address, step));
                load_matrices(k1, S::RowsK::step(k_address, step + 1));
#pragma unroll
                for (int t = 0; t < kRowTiles; t++) {
                    uint32_t q[4];
                    load_matrices(q, q_address + part * kPartBytes + t * 8 * kPitchQ + step * 32);
                    float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
                    multiply<Bf16K>(even, k0, q[0], q[1]);
                    multiply<Bf16K>(odd, k1, q[2], q[3]);
#pragma unroll
                    for (int i = 0; i < 4; i++) s[t][i] += even[i] + odd[i];
                }
            }
        }
    }

    // The weights of one row tile as B operands, largest term last.
    static __device__ __forceinline__ void split_weights(uint32_t (&b)[kWeightParts][2], const float (&w)[4]) {
        const float bias = Bf16V ? 1.f : kHalfBias;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = w[i * 2] * bias, y = w[i * 2 + 1] * bias;
#pragma unroll
            for (int part = kWeightParts - 1; part >= 0; part--) {
                const uint32_t bits = pack_pair<Bf16V>(x, y);
                const float2 back = unpack_pair<Bf16V>(bits);
                x -= back.x, y -= back.y;
                b[part][i] = transpose(bits);
            }
        }
    }

    // Makes the maxima no less than any of the scores x of a tile. Few tiles have one that is.
    __device__ __forceinline__ void keep_maxima(const float (&x)[kRowTiles][4]) {
        bool is_larger = false;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) is_larger |= x[t][i] > m[t][i % 2];
        }
        if (__any_sync(kAllLanes, is_larger)) raise_maxima(x);
    }
    __device__ __forceinline__ void raise_maxima(const float (&x)[kRowTiles][4]) {
        float shrink[kRowTiles][2];
        bool has_begun = false;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = fmaxf(x[t][i], x[t][2 + i]);
                top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 4));
                top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
                top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
                const float now = fmaxf(m[t][i], ceilf(top));
                has_begun |= m[t][i] > kNoMaximum;
                shrink[t][i] = power_of_two(m[t][i] - now);
                m[t][i] = now;
            }
        }
        if (!__any_sync(kAllLanes, has_begun)) return;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                l[t][i] *= shrink[t][i];
#pragma unroll
                for (int n = 0; n < kStepsV; n++) o[t][n][i] *= shrink[t][i], o[t][n][2 + i] *= shrink[t][i];
            }
        }
    }

    __device__ __forceinline__ void accumulate(const float (&w)[kRowTiles][4], uint32_t slot) {
        const int lane = threadIdx.x % 32;
        const uint32_t v_address = slot + S::kVAt + S::RowsV::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
        uint32_t b[kRowTiles][kWeightParts][2];
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) split_weights(b[t], w[t]);
#pragma unroll
        for (int n = 0; n < kStepsV; n++) {
            uint32_t v[4];
            load_matrices_transposed(v, S::RowsV::step(v_address, n));
            float d[kRowTiles][4];
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0.f;
#pragma unroll
            for (int part = 0; part < kWeightParts; part++) {
#pragma unroll
                for (int t = 0; t < kRowTiles; t++) multiply<Bf16V>(d[t], v, b[t][part][0], b[t][part][1]);
            }
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                for (int i = 0; i < 4; i++) o[t][n][i] += d[t][i];
            }
        }
    }

    // A non-finite V where a key is hidden from some row: a zero weight would not silence it. Such keys are added
    // row by row where they are seen, then cleared. Bit t * 4 + i of `seen` belongs to score [t][i] of this lane.
    __device__ __forceinline__ void add_row_by_row(const float (&w)[kRowTiles][4], uint32_t seen, uint32_t slot,
                                                   uint32_t keys) {
        const int lane = threadIdx.x % 32;
        const float bias = Bf16V ? 1.f : kHalfBias;
#pragma unroll 1
        while (keys != 0) {
            const int key = __ffs(keys) - 1;
            keys &= keys - 1;
            const int from = key % 8 * 4 + lane % 4;
            const uint32_t their_seen = __shfl_sync(kAllLanes, seen, from);
            const uint32_t v_address = slot + S::kVAt;
            float mine[kRowTiles][2];
            bool sees[kRowTiles][2];
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float low = __shfl_sync(kAllLanes, w[t][i], from);
                    const float high = __shfl_sync(kAllLanes, w[t][2 + i], from);
                    mine[t][i] = (key < 8 ? low : high) * bias;
                    sees[t][i] = their_seen >> (t * 4 + key / 8 * 2 + i) & 1;
                }
            }
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint16_t bits = load_shared16(v_address + S::RowsV::at(key, n * 2 + half) + lane / 4 * kHalfBytes);
                    const float x = unpack_pair<Bf16V>(bits).x;
#pragma unroll
                    for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float& to = o[t][n][half * 2 + i];
                            if (sees[t][i]) to = fmaf(mine[t][i], x, to);
                        }
                    }
                }
            }
            __syncwarp();
            for (int i = lane * 4; i < HeadDimV * kHalfBytes; i += 128) {
                store_shared(v_address + key * S::RowsV::kPitch + i, 0);
            }
            __syncwarp();
        }
    }

    // The keys of the tile that have a V which is not finite, one bit each.
    static __device__ __forceinline__ uint32_t keys_not_finite(const DecodeParams& p, uint32_t slot) {
        const int lane = threadIdx.x % 32;
        bool found = false;
        const int row = lane % 16;
#pragma unroll 4
        for (int i = 0; i < HeadDimV * kHalfBytes; i += 8) {
            const uint32_t at = S::RowsV::at(row, i / 16) + i % 16 + lane / 16 * 4;
            found |= pair_not_finite(load_shared(slot + S::kVAt + at), Bf16V);
        }
        const uint32_t lanes = __ballot_sync(kAllLanes, found);
        return (lanes | lanes >> 16) & 0xffffu;
    }

    __device__ __forceinline__ void attend(const DecodeParams& p, const Tile& tile, const char* shared,
                                           uint32_t slot) {
        const int lane = threadIdx.x % 32;
        const int* bounds = reinterpret_cast<const int*>(shared + S::kRowAt) + lane % 4 * 2;
        const float* scales = reinterpret_cast<const float*>(bounds + Rows);
        float scale[kRowTiles][2];
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) scale[t][0] = scales[t * 8], scale[t][1] = scales[t * 8 + 1];
        float s[kRowTiles][4];
        scores(p, s, shared, slot);

        // To log2 units. A hidden score becomes -inf, whatever it was.
        float x[kRowTiles][4];
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[t][i] = s[t][i] * scale[t][i % 2];
        }
        const bool by_position = is_bound_by_position(p);
        const bool hidden = by_position || tile.base + tile.keys - 1 > least_bound;
        uint32_t seen = 0xffffffffu;
        bool bad_position = false;
        if (hidden || tile.keys < kTile) {
            seen = 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int key = half * 8 + lane / 4;
                int position = tile.base + key;
                if (by_position && key < tile.keys) {
                    position = p.kv_position[tile.b * p.kv_position_stride + position];
                    if (position < 0) {
                        // Four lanes have a key.
                        const int64_t first = tile.b * p.kv_position_stride + tile.base;
                        if (lane % 4 == 0) report_position(p, tile.b, first, tile.keys);
                        bad_position = true;
                    }
                }
#pragma unroll
                for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const bool visible = key < tile.keys && position <= bounds[t * 8 + i];
                        seen |= static_cast<uint32_t>(visible) << (t * 4 + half * 2 + i);
                        if (!visible) x[t][half * 2 + i] = s[t][half * 2 + i] = -infinity();
                    }
                }
            }
        }

        keep_maxima(x);
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool coarse = fabsf(m[t][i]) >= kCoarse;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float score = s[t][half * 2 + i];
                    // The product unrounded, except where the score is hidden (-inf times a negative scale) and where
                    // its rounding is so coarse that the largest would be far from its own maximum.
                    float power = fmaf(score, scale[t][i], -m[t][i]);
                    if (coarse || score == -infinity()) power = x[t][half * 2 + i] - m[t][i];
                    x[t][half * 2 + i] = exp2_approx(power);
                }
                l[t][i] += x[t][i] + x[t][2 + i];
            }
        }

        if (bad_position) poison();
        if (hidden) {
            const uint32_t keys = keys_not_finite(p, slot);
            if (keys != 0) add_row_by_row(x, seen, slot, keys);
        }
        accumulate(x, slot);
    }

    // A sum that is not a number stays so, and makes the rows' results so.
    __device__ __forceinline__ void poison() {
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) l[t][0] = l[t][1] = not_a_number();
    }

    static constexpr int kSums = kStepsV * 2 + 1;  // over one maximum
    using Long = LongSums<S, kSums, kRowTiles * 2>;
    static_assert(Long::kGroupFloats * 4 <= S::kSlotBytes, "sums of a row");

    // Closes the sums by way of a slot, or, at an item's end, adds what was closed to them.
    __device__ __forceinline__ void close_sums(char* slot, float2* to, bool exist, bool is_last) {
        float* const mine = reinterpret_cast<float*>(slot) + threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int n = 0; n < kStepsV; n++) mine[n * 64] = o[t][n][i], mine[n * 64 + 32] = o[t][n][2 + i];
                mine[kStepsV * 64] = l[t][i], mine[kSums * 32] = m[t][i];
                close_group<kSums>(mine, to + (t * 2 + i) * Long::kGroupFloats, exist, is_last);
                // Sums begin anew, or are whole.
#pragma unroll
                for (int n = 0; n < kStepsV; n++) {
                    o[t][n][i] = is_last ? mine[n * 64] : 0.f, o[t][n][2 + i] = is_last ? mine[n * 64 + 32] : 0.f;
                }
                l[t][i] = is_last ? mine[kStepsV * 64] : 0.f;
            }
        }
    }

    // Where this lane's rows of row tile t have their maxima; kWarps * Rows floats further on, their sums.
    static __device__ __forceinline__ float* of_row(char* shared, int warp, int t) {
        return reinterpret_cast<float*>(shared + S::kStateAt) + warp * Rows + t * 8 + threadIdx.x % 4 * 2;
    }

    // Writes the warp's maxima, sums and O.
    __device__ __forceinline__ void close(char* shared, float* to) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const float unbias = Bf16V ? 1.f : 1.f / kHalfBias;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
            float sum[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sum[i] = l[t][i];
                sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 4);
                sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 8);
                sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 16);
            }
            if (lane < 4) {
                *reinterpret_cast<float2*>(of_row(shared, warp, t)) = make_float2(m[t][0], m[t][1]);
                *reinterpret_cast<float2*>(of_row(shared, warp, t) + S::kWarps * Rows) = make_float2(sum[0], sum[1]);
            }
            float* at = to + (t * 8 + lane % 4 * 2) * S::kPitchO + lane / 4;
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) at[i % 2 * S::kPitchO + n * 16 + i / 2 * 8] = o[t][n][i] * unbias;
            }
        }
    }
};

}  // namespace treeattn
