// Decode on tensor cores for wide heads: how the warps of a block attend a step's keys together.
//
// A step has two halves, with a barrier after each. In the first every warp multiplies: its part of the dims of the next step's
// scores, and its columns of this step's weights times values. In the second every thread has one score, a row's of one key: it
// sums the score's parts, does what terms there are, and makes a weight of it in 16-bit terms. So terms are looked for once a
// score, and every kernel knows them. Numbers are treated as in decode_mma.cuh. A `Tile` here is a step's.
#pragma once

#include "decode_mma.cuh"
#include "weigh.cuh"
#include "wide.cuh"

namespace treeattn {

template <bool View, bool Bf16>
struct WideMma {
    using S = WideShape<View>;
    using Numbers = Mma<64, 64, 8, Bf16, Bf16>;  // how they become terms
    static constexpr int kWeightTerms = Numbers::kWeightParts;
    static constexpr int kRowTiles = S::kRows / 8, kStepsV = S::kColumns / 16;
    static constexpr int kMostSteps = S::kDimQk / 16 / S::kWarpsAWalker + 1;  // of 16 dims, a warp's

    // This lane's part of the warp's columns, as in Mma.
    float o[kRowTiles][kStepsV][4];
    // Of this thread's row: the maximum; the sum of its key's weights; scale to log2 units; the places it sees.
    float m, l, scale;
    int low, high;
    // Of this thread's key in the next step: its place, whether the row sees it, its element of the mask.
    int place;
    bool sees;
    float element;

    static __device__ __forceinline__ int row() { return threadIdx.x / S::kKeys; }
    static __device__ __forceinline__ int key() { return threadIdx.x % S::kKeys; }
    static __device__ __forceinline__ bool has_score() { return S::kScores == S::kThreads || threadIdx.x < S::kScores; }
    template <class T>
    static __device__ __forceinline__ T* at(char* shared, int offset) {
        return reinterpret_cast<T*>(shared + offset);
    }
    static __device__ __forceinline__ const TermsBlock<S::kRows>& terms(const char* shared) {
        return *reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt);
    }
    static __device__ __forceinline__ bool by_position(const DecodeParams& p) {
        return p.placement == kExplicit && needs_positions<true>(p);
    }

    // Writes the item's query tile to shared memory, one warp a row.
    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared, int rows) {
        const int lane = threadIdx.x % 32;
        const bool plain = p.q_dtype == Numbers::kKType && p.q_stride[2] == 2 &&
                           ((reinterpret_cast<uintptr_t>(p.q) | p.q_stride[0] | p.q_stride[1]) & 15) == 0;
#pragma unroll 1
        for (int row = threadIdx.x / 32; row < S::kRows; row += S::kWarps) {
            const int packed = item.row_tile * S::kRows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            const char* from =
                static_cast<const char*>(p.q) + (item.first_token + token) * p.q_stride[0] + head * p.q_stride[1];
            const bool live = row < rows;
            float row_scale = 1.f;
            if (plain) {
#pragma unroll
                for (int i = 0; i < S::kDimQk / 8; i += 32) {
                    uint4 bits = make_uint4(0, 0, 0, 0);
                    const int unit = i + lane;
                    if (live && unit * 8 < p.head_dim_qk) bits = *reinterpret_cast<const uint4*>(from + unit * 16);
                    if (unit * 8 < S::kDimQk) *at<uint4>(shared, S::kQueryAt + S::RowsK::at(row, unit)) = bits;
                }
            } else {
                row_scale = stage_terms(p, live ? from : nullptr, shared + S::kQueryAt, row);
            }
            if (lane == 0) at<float>(shared, S::kScaleAt)[row] = live ? p.scale * kLog2E * row_scale : 0.f;
        }
        stage_terms_of<S>(p, item, shared, rows);
    }

    // A row of another type or at odd strides, as terms of the type of k. Gives the power of two that the scores lack.
    static __device__ __noinline__ float stage_terms(const DecodeParams& p, const char* from, char* to, int row) {
        const int lane = threadIdx.x % 32;
        int exponent = 0;
        if (!Bf16 && p.q_dtype != kF16 && from != nullptr) {
            // Into f16's range.
            float top = 0.f;
#pragma unroll 1
            for (int d = lane; d < p.head_dim_qk; d += 32) {
                top = fmaxf(top, fabsf(load_element(from + d * p.q_stride[2], p.q_dtype)));
            }
#pragma unroll
            for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
            if (top > 0.f && isfinite(top)) exponent = max(ilogbf(top) - 14, -126);
        }
#pragma unroll 1
        for (int unit = lane; unit < S::kDimQk / 8; unit += 32) {
            float x[8] = {};
            if (from != nullptr && unit * 8 < p.head_dim_qk) {
                load_eight(x, from + unit * 8 * p.q_stride[2], p.q_stride[2], p.q_dtype);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = exponent == 0 ? x[i] : ldexpf(x[i], -exponent);
            const int parts = Numbers::query_parts(p);
#pragma unroll 1
            for (int part = 0; part < parts; part++) {
                const uint4 bits = make_uint4(Numbers::take_term(x[0], x[1]), Numbers::take_term(x[2], x[3]),
                                              Numbers::take_term(x[4], x[5]), Numbers::take_term(x[6], x[7]));
                *reinterpret_cast<uint4*>(to + part * S::kRows * S::RowsK::kPitch + S::RowsK::at(row, unit)) = bits;
            }
        }
        return exponent == 0 ? 1.f : ldexpf(1.f, exponent);
    }

    // Begins an item, whose queries and terms are in shared memory.
    __device__ __forceinline__ void begin(char* shared) {
        const RowTerms& row_terms = terms(shared).rows[row() % S::kRows];
        m = kNoMaximum, l = 0.f;
        scale = at<float>(shared, S::kScaleAt)[row() % S::kRows];
        low = row_terms.seen.low, high = row_terms.seen.high;
        clear();
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int n = 0; n < kStepsV; n++) o[t][n][0] = o[t][n][1] = o[t][n][2] = o[t][n][3] = 0.f;
        }
    }

    // Asks for what the thread has to know of its key in a step.
    __device__ __forceinline__ void ask(const DecodeParams& p, const Tile& step, char* shared) {
        const Terms& t = terms_of(p);
        const int slot = step.base + key();
        const bool live = has_score() && key() < step.keys;
        place = slot;
        if (by_position(p) && live) place = terms(shared).item.positions[slot];
        sees = live && place <= high && place >= low;
        element = 1.f;
        if (t.mask_element == kMaskNone) return;
        const char* mask = terms(shared).rows[row() % S::kRows].mask;
        if (mask == nullptr) element = t.mask_element == kMaskByte ? 1.f : 0.f;
        if (mask == nullptr || !sees) return;
        mask += slot * t.mask_stride[3];
        element = t.mask_element == kMaskF16    ? unpack_pair<false>(*reinterpret_cast<const uint16_t*>(mask)).x
                  : t.mask_element == kMaskF32 ? *reinterpret_cast<const float*>(mask)
                                               : static_cast<float>(*reinterpret_cast<const uint8_t*>(mask));
    }

    // Leaves this warp's part of the scores of the tile in its walker's slot of a stage.
    static __device__ __forceinline__ void multiply_keys(const DecodeParams& p, char* shared, int stage) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int walker = warp / S::kWarpsAWalker, own = warp % S::kWarpsAWalker;
        const int steps = (p.head_dim_qk + 15) / 16;
        const uint32_t k = shared_address(shared) + (walker * S::kStages + stage) * S::kSlotBytes +
                           S::RowsK::step(S::RowsK::at(lane % 16, lane / 16), own);
        const uint32_t q = shared_address(shared + S::kQueryAt) +
                           S::RowsK::step(S::RowsK::at((lane / 16 * 8 + lane % 8) % S::kRows, lane / 8 % 2), own);
        float s[kRowTiles][4] = {};
        // Small terms first.
#pragma unroll 1
        for (int part = Numbers::query_parts(p) - 1; part >= 0; part--) {
#pragma unroll
            for (int i = 0; i < kMostSteps; i++) {
                // Eight steps are whole groups of units that change places.
                constexpr int kFurther = S::kWarpsAWalker / 4 * 128;
                if (own + i * S::kWarpsAWalker >= steps) break;
                uint32_t a[4], b[4];
                load_matrices(a, k + i * kFurther);
                load_matrices(b, q + part * S::kRows * S::RowsK::kPitch + i * kFurther);
#pragma unroll
                for (int t = 0; t < kRowTiles; t++) {
                    float d[4] = {0.f, 0.f, 0.f, 0.f};
                    multiply<Bf16>(d, a, b[t * 2], b[t * 2 + 1]);
#pragma unroll
                    for (int j = 0; j < 4; j++) s[t][j] += d[j];
                }
            }
        }
        float* parts = at<float>(shared, S::kPartsAt);
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                parts[S::score_at(walker, own, t * 8 + lane % 4 * 2 + j % 2, lane / 4 + j / 2 * 8)] = s[t][j];
            }
        }
    }

    // Turns this thread's score into a weight. Says whether rows' sums have to shrink, or one of the step's keys is hidden from
    // this row.
    __device__ __forceinline__ bool weigh(const DecodeParams& p, const Tile& step, char* shared) {
        if (!has_score()) return false;
        const Terms& t = terms_of(p);
        const RowTerms& row_terms = terms(shared).rows[row()];
        const float* parts = at<float>(shared, S::kPartsAt) + S::score_at(key() / kTile, 0, row(), key() % kTile);
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < S::kWarpsAWalker; i++) sum[i % 2] += parts[i * S::kPartFloats];
        float s = sum[0] + sum[1], factor = scale, added = 0.f, slope = 0.f, distance = 0.f;
        if (by_position(p) && __any_sync(kAllLanes, key() < step.keys && place < 0)) {
            if (threadIdx.x == 0) report_positions<S>(p, step, shared);
            poison();
        }
        if (t.mask_element != kMaskNone) {
            sees = sees && (t.mask_element == kMaskByte ? element != 0.f : element != -infinity());
            if (t.mask_element != kMaskByte) added = row_terms.factor * element;
        }
        if (t.slopes != nullptr) {
            int position = place;
            if (p.placement == kInterleaved) {
                const int run = p.interleave, nth = place / run;
                position = static_cast<int>((static_cast<int64_t>(nth) * p.world + p.rank) * run + (place - nth * run));
            }
            slope = row_terms.slope;
            distance = fabsf(static_cast<float>(row_terms.position - position));
        }
        if (t.softcap > 0.f) {
            s = t.softcap * tanh_of(s * (factor * t.cap_inverse));
            factor = kLog2E;
        }
        // A hidden score becomes -inf, whatever it was.
        const float x = sees ? fmaf(s, factor, fmaf(-slope, distance, added)) : -infinity();
        float shrink = 1.f;
        bool is_special = __any_sync(kAllLanes, x > m);
        if (is_special) {
            float top = x;
#pragma unroll
            for (int d = S::kKeys / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
            const float now = fmaxf(m, ceilf(top));
            shrink = power_of_two(m - now);
            l *= shrink;
            m = now;
        }
        // Summed unrounded, except where the rounding of a score is so coarse that the largest would be far from its own
        // maximum.
        float power = fmaf(s, factor, fmaf(-slope, distance, added - m));
        if (fabsf(m) >= kCoarse) power = x - m;
        float weight = sees ? exp2_approx(power) : 0.f;
        l += weight;
        const uint32_t seen = __ballot_sync(kAllLanes, sees) >> (threadIdx.x % 32 / S::kKeys * S::kKeys);
        if (key() == 0) at<float>(shared, S::kShrinkAt)[row()] = shrink, at<uint32_t>(shared, S::kSeenAt)[row()] = seen;
        if (!Bf16) weight *= kHalfBias;
        char* to = shared + S::kWeightsAt + row() * S::kWeightPitch + key() * kHalfBytes;
#pragma unroll
        for (int part = kWeightTerms - 1; part >= 0; part--) {
            const uint32_t bits = pack_pair<Bf16>(weight, 0.f);
            weight -= unpack_pair<Bf16>(bits).x;
            *reinterpret_cast<uint16_t*>(to + part * S::kWeightTermBytes) = static_cast<uint16_t>(bits);
        }
        return is_special || (key() < step.keys && !sees);
    }

    // Adds a step's weights times values to this warp's columns. `is_special`: of some thread, as weigh says.
    __device__ __forceinline__ void accumulate(const DecodeParams& p, const Tile& step, char* shared, int stage,
                                               bool is_special) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = p.head_dim_v() - warp * S::kColumns;
        if (columns <= 0) return;
        const uint32_t values = shared_address(shared) + stage * S::kSlotBytes + S::kVAt;
        int first_unit = warp * (S::kColumns / 8);
        if constexpr (View) {
            first_unit += static_cast<int>(static_cast<const char*>(p.v) - static_cast<const char*>(p.k)) / 16;
        }
        if (is_special) {
            const float* shrink = at<float>(shared, S::kShrinkAt) + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float by = shrink[t * 8 + i];
#pragma unroll
                    for (int n = 0; n < kStepsV; n++) o[t][n][i] *= by, o[t][n][2 + i] *= by;
                }
            }
            const uint32_t all = step.keys < 32 ? (1u << step.keys) - 1 : kAllLanes;
            if (__any_sync(kAllLanes, (at<uint32_t>(shared, S::kSeenAt)[lane % S::kRows] & all) != all)) {
                const uint32_t keys = keys_not_finite(values, first_unit, min(columns, S::kColumns), step.keys);
                if (keys != 0) add_row_by_row(shared, values, first_unit, keys);
            }
        }
        const uint32_t weights = shared_address(shared + S::kWeightsAt) +
                                 (lane / 16 * 8 + lane % 8) % S::kRows * S::kWeightPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int g = 0; g < S::kWalkers; g++) {
            // A tile without keys was not copied.
            if (g * kTile >= step.keys) break;
            uint32_t b[kWeightTerms][4];
#pragma unroll
            for (int part = 0; part < kWeightTerms; part++) {
                load_matrices(b[part], weights + part * S::kWeightTermBytes + g * 32);
            }
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
                // Columns past the last are nobody's.
                if (n * 16 >= columns) break;
                uint32_t v[4];
                const int unit = min(first_unit + n * 2 + lane / 8 % 2, S::RowsV::kPitch / 16 - 1);
                load_matrices_transposed(v, values + g * S::kStages * S::kSlotBytes +
                                                S::RowsV::at(lane / 16 * 8 + lane % 8, unit));
#pragma unroll
                for (int t = 0; t < kRowTiles; t++) {
                    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int part = 0; part < kWeightTerms; part++) multiply<Bf16>(d, v, b[part][t * 2], b[part][t * 2 + 1]);
#pragma unroll
                    for (int i = 0; i < 4; i++) o[t][n][i] += d[i];
                }
            }
        }
    }

    // Where a 16-byte unit of the value of a step's key lies.
    static __device__ __forceinline__ uint32_t value_at(uint32_t values, int key, int unit) {
        return values + key / kTile * S::kStages * S::kSlotBytes + S::RowsV::at(key % kTile, unit);
    }

    // The keys of a step that have a value which is not finite among some columns, one bit each.
    static __device__ __noinline__ uint32_t keys_not_finite(uint32_t values, int first_unit, int columns, int keys) {
        const int lane = threadIdx.x % 32;
        bool found = false;
#pragma unroll 1
        for (int unit = 0; unit * 8 < columns && lane < keys; unit++) {
            const uint4 x = load_shared_four(value_at(values, lane, first_unit + unit));
            found |= pair_not_finite(x.x, Bf16) || pair_not_finite(x.y, Bf16) || pair_not_finite(x.z, Bf16) ||
                     pair_not_finite(x.w, Bf16);
        }
        return __ballot_sync(kAllLanes, found);
    }

    // Adds such keys row by row where they are seen, then clears them: a zero weight would not silence them.
    __device__ __forceinline__ void add_row_by_row(char* shared, uint32_t values, int first_unit, uint32_t keys) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        while (keys != 0) {
            const int key = __ffs(keys) - 1;
            keys &= keys - 1;
            float weight[kRowTiles][2];
            bool is_seen[kRowTiles][2];
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = t * 8 + lane % 4 * 2 + i;
                    is_seen[t][i] = at<uint32_t>(shared, S::kSeenAt)[row] >> key & 1;
                    weight[t][i] = 0.f;
#pragma unroll
                    for (int part = 0; part < kWeightTerms; part++) {
                        const char* term = shared + S::kWeightsAt + part * S::kWeightTermBytes + row * S::kWeightPitch;
                        weight[t][i] += unpack_pair<Bf16>(*reinterpret_cast<const uint16_t*>(term + key * kHalfBytes)).x;
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int unit = min(first_unit + n * 2 + half, S::RowsV::kPitch / 16 - 1);
                    const float x = unpack_pair<Bf16>(load_shared16(value_at(values, key, unit) + lane / 4 * kHalfBytes)).x;
#pragma unroll
                    for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            float& to = o[t][n][half * 2 + i];
                            if (is_seen[t][i]) to = fmaf(weight[t][i], x, to);
                        }
                    }
                }
            }
            __syncwarp();
            if (lane < S::kColumns / 8 && first_unit + lane < S::RowsV::kPitch / 16) {
                clear_shared(value_at(values, key, first_unit + lane));
            }
            __syncwarp();
        }
    }

    // A sum that is not a number stays so, and makes the rows' results so.
    __device__ __forceinline__ void poison() { l = not_a_number(); }

    // Leaves the rows' maxima and sums in shared memory.
    __device__ __forceinline__ void leave_state(char* shared) const {
        if (!has_score()) return;
        float sum = l;
#pragma unroll
        for (int d = S::kKeys / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
        if (key() == 0) at<RowState>(shared, S::kStateAt)[row()] = RowState{m, sum};
    }

    // Closed sums: of each lane its part of the output's rows, over the rows' maxima, then its sum of weights.
    static constexpr int kSums = kStepsV * 2;
    using Long = LongSums<S, kSums, kRowTiles * 2 + 1>;

    // Closes the sums by way of a consumed stage, or, at an item's end, adds what was closed to them. The rows' state is in
    // shared memory.
    __device__ __forceinline__ void close_sums(char* shared, int stage, float2* to, bool exist, bool is_last) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        static_assert(S::kWarpsAWalker * Long::kGroupFloats * 4 <= S::kSlotBytes, "by way of a slot");
        float* mine = at<float>(shared, (warp / S::kWarpsAWalker * S::kStages + stage) * S::kSlotBytes) +
                      warp % S::kWarpsAWalker * Long::kGroupFloats + lane;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int n = 0; n < kStepsV; n++) mine[n * 64] = o[t][n][i], mine[n * 64 + 32] = o[t][n][2 + i];
                mine[kSums * 32] = at<RowState>(shared, S::kStateAt)[t * 8 + lane % 4 * 2 + i].m;
                close_group<kSums>(mine, to + (t * 2 + i) * Long::kGroupFloats, exist, is_last);
                // Sums begin anew, or are whole.
#pragma unroll
                for (int n = 0; n < kStepsV; n++) {
                    o[t][n][i] = is_last ? mine[n * 64] : 0.f, o[t][n][2 + i] = is_last ? mine[n * 64 + 32] : 0.f;
                }
            }
        }
        mine[0] = l, mine[32] = m;
        close_group<1>(mine, to + kRowTiles * 2 * Long::kGroupFloats, exist, is_last);
        l = is_last ? mine[0] : 0.f;
    }

    // Writes the warp's columns to where the queries were.
    __device__ __forceinline__ void close(char* shared) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const float unbias = Bf16 ? 1.f : 1.f / kHalfBias;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
            float* to = at<float>(shared, S::kQueryAt) + (t * 8 + lane % 4 * 2) * S::kPitchO + warp * S::kColumns + lane / 4;
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) to[i % 2 * S::kPitchO + n * 16 + i / 2 * 8] = o[t][n][i] * unbias;
            }
        }
    }
};

}  // namespace treeattn
