// Decode on tensor cores over keys and values in ggml's blocks, both q8_0 or both q4_0, with all that decode_terms.cu knows; 64 or
// 128 dims.
//
// Rows come into shared memory in the units that hold them (blocks.cuh) and go from there to registers as matrices of halfwords:
// lane (key g, column c) of K has halfwords 2 c and 2 c + 1 of each unit of two rows, lane (dim g, key c) of V halfword g of each
// unit of four. Codes are widened to f16, which they are exactly, straight into the multiply's operands. Scales of keys count
// where the products of 32 dims are summed. Those of values are f16 numbers, and so are the two terms of a weight: what a block's
// values are weighted by is a product of two f16 and what it lacks, which is another f16, over a power of two that all weights of
// a warp share for the block. Scales that are too far from it for that, or no finite numbers, are rare: such a tile's weights are
// split in fp32.
//
// Maxima are whole, in log2 units, and grow seldom: what was summed is scaled there and then, and not in every tile.
#include "blocks.cuh"
#include "decode_mma.cuh"
#include "weigh.cuh"

namespace treeattn {

template <int Dim, int32_t Type>
struct InBlocks : Mma<Dim, Dim, 8, false, false, true, SlotBlocks<Dim, Type>> {
    using Base = Mma<Dim, Dim, 8, false, false, true, SlotBlocks<Dim, Type>>;
    using typename Base::S;
    using Codes = BlockCodes<Type>;
    using Rows = typename S::RowsK;
    static constexpr int kBlocks = Dim / 32, kUnits = Rows::kUnits, kWords = Codes::kWords;
    // Bytes of a query block of all rows: 16 a lane.
    static constexpr int kQueryBlock = 512;
    static_assert(kBlocks * kQueryBlock <= Base::kPartBytes, "a part of the query");
    // What f16 weights carry, in log2 units: times a scale below 2 they stay within f16.
    static constexpr float kBias = 14.f, kUnbias = 1.f / 16384.f;

    using Units = uint32_t[2][kUnits];  // of the tile's first eight keys, and of the others

    SeenByAll all;          // what nothing but a difference to the maxima happens to
    uint32_t bad;           // 2 bits a block: rows that have seen a scale that is no finite number
    uint32_t inverse[kBlocks];  // of the power of two that o is in, twice, as f16
    uint32_t pick_keys[kBlocks];  // which of two units' halfwords are a block's
    int keys_at;            // where the lane's first row of K begins in a slot
    int scales_at;          // the lane that has the scales of the first block's values

    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        int* begins = reinterpret_cast<int*>(shared + S::kRowAt);
        float* scales = reinterpret_cast<float*>(begins + S::kRows);
        const int begin = row_begin(p, item, false);
        if (threadIdx.x == 0) begins[0] = begin, begins[1] = row_begin(p, item, true), begins[2] = rows;
#pragma unroll 1
        for (int row = threadIdx.x / 32; row < S::kRows; row += S::kWarps) {
            const int packed = item.row_tile * S::kRows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            const char* from =
                static_cast<const char*>(p.q) + (item.first_token + token) * p.q_stride[0] + head * p.q_stride[1];
            const bool live = row < rows;
            const float row_scale = stage_row(p, live ? from : nullptr, shared + S::kQueryAt + row * 64, begin);
            if (threadIdx.x % 32 == 0) scales[row] = live ? p.scale * kLog2E * row_scale : 0.f;
        }
        stage_terms_of<S>(p, item, shared, rows);
    }

    // A row of the query where the codes of K will be: as the second operand of its multiplies, a block's two side by side.
    static __device__ __noinline__ float stage_row(const DecodeParams& p, const char* from, char* to, int begin) {
        const int lane = threadIdx.x % 32, block = lane / 4;
        float x[8];
        const float row_scale = Base::load_query(p, from, x);
        const int terms = Base::query_parts(p);
#pragma unroll 1
        for (int part = 0; part < terms; part++) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const uint32_t bits = Base::take_term(x[i], x[i + 1]);
                if (lane * 8 >= Dim) continue;
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int2 place = Codes::place_of(lane % 4 * 8 + i + n, Codes::first_place(begin, block));
                    const int at = place.y % 8 / 2 * 16 + place.x * 8 + place.y / 8 * 4 + place.y % 2 * 2;
                    *reinterpret_cast<uint16_t*>(to + part * Base::kPartBytes + block * kQueryBlock + at) =
                        static_cast<uint16_t>(bits >> n * 16);
                }
            }
        }
        return row_scale;
    }

    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
        const int* begins = reinterpret_cast<const int*>(shared + S::kRowAt);
        all.template begin<S>(p, shared);
        const Terms& t = terms_of(p);
        if (t.softcap > 0.f || t.slopes != nullptr || t.mask_element != kMaskNone) all.low = INT32_MAX;
        bad = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) this->m[0][i] = kNoMaximum, this->l[0][i] = 0.f;
#pragma unroll
        for (int n = 0; n < Base::kStepsV; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) this->o[0][n][i] = 0.f;
        }
        keys_at = g * Rows::kPitch + begins[0];
        scales_at = begins[1] / 2 * 4 + c;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            inverse[block] = 0x78007800u;
            const int keys = Codes::first_place(begins[0], block);
            pick_keys[block] = (2 * c >= keys ? 0x10u : 0x54u) | (2 * c + 1 >= keys ? 0x3200u : 0x7600u);
        }
    }

    template <bool OfV>
    static __device__ __forceinline__ void load_units(Units& to, uint32_t slot) {
        const int lane = threadIdx.x % 32;
        const uint32_t at = slot + (OfV ? S::kVAt : 0) + lane % 16 * Rows::kPitch + lane / 16 * 16;
#pragma unroll
        for (int unit = 0; unit + 1 < kUnits; unit += 2) {
            uint32_t four[4];
            if constexpr (OfV) {
                load_matrices_transposed(four, at + unit * 16);
            } else {
                load_matrices(four, at + unit * 16);
            }
            to[0][unit] = four[0], to[1][unit] = four[1], to[0][unit + 1] = four[2], to[1][unit + 1] = four[3];
        }
        load_two_matrices<OfV>(to[0][kUnits - 1], to[1][kUnits - 1], at + (kUnits - 1) * 16);
    }

    // A block's codes of keys, and of values.
    __device__ __forceinline__ void take_keys(uint32_t (&to)[kWords], const uint32_t (&units)[kUnits], int block) const {
#pragma unroll
        for (int n = 0; n < kWords; n++) {
            to[n] = pick_bytes_by(units[block * kWords + n], units[block * kWords + n + 1], pick_keys[block]);
        }
    }
    __device__ __forceinline__ void take_values(uint32_t (&to)[kWords], const uint32_t (&units)[kUnits], int block) const {
        // The scale is at place scales_at / 4 + block of the first unit.
        const bool first = static_cast<int>(threadIdx.x % 32 / 4) - scales_at / 4 > block;
#pragma unroll
        for (int n = 0; n < kWords; n++) to[n] = first ? units[block * kWords + n] : units[block * kWords + n + 1];
    }

    // The products of one part of the query, summed over a block, times the scales of the block's keys.
    __device__ __forceinline__ void add_block(float (&s)[4], const Units& units, int block, uint32_t q_address,
                                              const float (&key_scale)[2]) const {
        const uint4 q = load_shared_four(q_address + block * kQueryBlock);
        uint32_t first[kWords], second[kWords], k[4];
        take_keys(first, units[0], block);
        take_keys(second, units[1], block);
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        Codes::widen_keys(k, first, second, 0);
        multiply<false>(sum, k, q.x, q.y);
        Codes::widen_keys(k, first, second, 1);
        multiply<false>(sum, k, q.z, q.w);
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = fmaf(sum[i], key_scale[i / 2], s[i]);
    }

    __device__ __forceinline__ void scores(const DecodeParams& p, float (&s)[4], const Units& units, const char* shared,
                                           uint32_t slot) const {
        const uint32_t q_address = shared_address(shared + S::kQueryAt) + threadIdx.x % 32 * 16;
        const int parts = Base::query_parts(p);
        float key_scale[kBlocks][2];
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t at = slot + keys_at + half * 8 * Rows::kPitch + block * Codes::kBytes;
                key_scale[block][half] = unpack_pair<false>(load_shared16(at)).x;
            }
        }
        s[0] = s[1] = s[2] = s[3] = 0.f;
        // Small terms first.
        if (__builtin_expect(parts > 1, 0)) {
#pragma unroll 1
            for (int part = parts - 1; part > 0; part--) {
                // Once more, lest what they are widened to is kept.
                Units again;
                load_units<false>(again, slot);
#pragma unroll
                for (int block = 0; block < kBlocks; block++) {
                    add_block(s, again, block, q_address + part * Base::kPartBytes, key_scale[block]);
                }
            }
        }
#pragma unroll
        for (int block = 0; block < kBlocks; block++) add_block(s, units, block, q_address, key_scale[block]);
    }

    // The exponents of a tile's weights where there is more to it than a difference to the maxima, or these grow.
    __device__ __forceinline__ uint32_t weigh_anew(const DecodeParams& p, const Tile& tile, const char* shared,
                                                   const char* stage, const float (&scale)[2], float (&s)[4],
                                                   float (&w)[4]) {
        const Terms& t = terms_of(p);
        const TileTerms<1> terms = ask_terms<S, 1>(p, all, tile, shared, stage);
        float factor[2] = {scale[0], scale[1]}, x[4], grow[2];
        if (t.softcap > 0.f) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[i] = t.softcap * tanh_of(s[i] * (factor[i % 2] * t.cap_inverse));
            factor[0] = factor[1] = kLog2E;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A hidden score becomes -inf, whatever it was.
            const float added = fmaf(-terms.slope[0][i % 2], terms.distance[0][i], terms.bias[0][i]);
            x[i] = terms.seen >> i & 1 ? fmaf(s[i], factor[i % 2], added) : -infinity();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float top = fmaxf(x[i], x[2 + i]);
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 4));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
            const float before = this->m[0][i], now = top > before ? ceilf(top) : before;
            const bool coarse = fabsf(now) >= kCoarse && now != kNoMaximum;
            // From here to the item's end, scores are rounded before so large a maximum is subtracted.
            if (coarse) all.low = INT32_MAX;
            this->m[0][i] = now;
            grow[i] = power_of_two(before - now);
            this->l[0][i] *= grow[i];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = half * 2 + i;
                const float added = fmaf(-terms.slope[0][i], terms.distance[0][at], terms.bias[0][at] + (kBias - now));
                const float power = coarse ? x[at] - now + kBias : fmaf(s[at], factor[i], added);
                w[at] = terms.seen >> at & 1 ? power : -infinity();
            }
        }
        if (__any_sync(kAllLanes, grow[0] != 1.f || grow[1] != 1.f)) {
#pragma unroll
            for (int n = 0; n < Base::kStepsV; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) this->o[0][n][i] *= grow[i % 2];
            }
        }
        if (__any_sync(kAllLanes, terms.bad_position)) {
            if (threadIdx.x % 32 == 0) report_positions<S>(p, tile, shared);
            this->poison();
        }
        return terms.seen;
    }

    using Weights = uint32_t[kBlocks][2][2];  // of a block: the small terms of both halves of the keys, then the large ones

    // The weights of a tile with scales that are far from the others, or that are no finite numbers; `slot` that of the tile.
    __device__ __forceinline__ void split_anew(Weights& b, const float (&w)[4], uint32_t seen, const char* shared,
                                               uint32_t slot, int begin) {
        // Nothing is hidden from rows that there are not.
        const int rows = reinterpret_cast<const int*>(shared + S::kRowAt)[2] - threadIdx.x % 4 * 2;
        uint32_t odd = 0;
        const uint32_t at = slot + S::kVAt + threadIdx.x % 32 / 4 * Rows::kPitch + begin;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            float own[2], top = 0.f;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t of_key = at + half * 8 * Rows::kPitch + block * Codes::kBytes;
                own[half] = unpack_pair<false>(load_shared16(of_key)).x;
                if (!(fabsf(own[half]) < infinity())) {
                    odd |= (seen >> half * 2 & 3) << block * 2;
                    own[half] = 0.f;
                }
                // Scales of keys that weigh next to nothing do not count for more than that.
                const float most = fmaxf(rows > 0 ? w[half * 2] : 0.f, rows > 1 ? w[half * 2 + 1] : 0.f);
                top = fmaxf(top, fabsf(own[half]) * fminf(most * 1024.f, 1.f));
            }
#pragma unroll
            for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
            // The unit that brings the largest to between a half and 1, if it is a larger one.
            const float before = unpack_pair<false>(inverse[block]).x;
            const float wanted = __uint_as_float((253u << 23) - (__float_as_uint(top) & 0x7f800000u));
            const float now = fminf(before, wanted);
            if (now != before) {
                const float shrink = now * __uint_as_float(0x7f000000u - __float_as_uint(before));
#pragma unroll
                for (int i = 0; i < 8; i++) this->o[0][block * 2 + i / 4][i % 4] *= shrink;
                inverse[block] = pack_pair<false>(now, now);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float factor = own[half] * now;
                float x = w[half * 2] * factor, y = w[half * 2 + 1] * factor;
#pragma unroll
                for (int part = 1; part >= 0; part--) {
                    const uint32_t bits = pack_pair<false>(x, y);
                    const float2 back = unpack_pair<false>(bits);
                    x -= back.x, y -= back.y;
                    b[block][part][half] = transpose(bits);
                }
            }
        }
        odd |= __shfl_xor_sync(kAllLanes, odd, 4);
        odd |= __shfl_xor_sync(kAllLanes, odd, 8);
        odd |= __shfl_xor_sync(kAllLanes, odd, 16);
        bad |= odd;
    }

    __device__ __forceinline__ void attend(const DecodeParams& p, const Tile& tile, const char* shared, uint32_t slot,
                                           const char* stage) {
        Units keys, values;
        load_units<false>(keys, slot);
        // Early, where there are registers for both.
        constexpr bool kEarly = kUnits < 9;
        if constexpr (kEarly) load_units<true>(values, slot);
        // Of this lane's rows, to log2 units.
        const float* of_rows = reinterpret_cast<const float*>(shared + S::kRowAt + S::kRows * 4) + threadIdx.x % 4 * 2;
        const float scale[2] = {of_rows[0], of_rows[1]};
        float s[4], w[4];
        scores(p, s, keys, shared, slot);
        if constexpr (!kEarly) load_units<true>(values, slot);

        const float lift[2] = {kBias - this->m[0][0], kBias - this->m[0][1]};
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = fmaf(s[i], scale[i % 2], lift[i % 2]);
        uint32_t seen = 0xfu;
        const bool is_plain = tile.keys == kTile && tile.base >= all.low && tile.base + (kTile - 1) <= all.high;
        const float top = fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]));
        if (__builtin_expect(__any_sync(kAllLanes, !is_plain || top > kBias), 0)) {
            seen = weigh_anew(p, tile, shared, stage, scale, s, w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = exp2_approx(w[i]);
        this->l[0][0] += w[0] + w[2];
        this->l[0][1] += w[1] + w[3];

        Weights b;
        uint32_t scales[kBlocks][2], any = 0, every = 0xffffffffu;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t both = __shfl_sync(kAllLanes, values[half][block * kWords], scales_at + block * 4);
                scales[block][half] = multiply_f16(both, inverse[block]);
                any |= scales[block][half], every &= scales[block][half];
            }
        }
        // Below 2, and not below 2^-7.
        if (__builtin_expect(__any_sync(kAllLanes, (any & 0x40004000u | ~every & 0x20002000u) != 0), 0)) {
            split_anew(b, w, seen, shared, slot, scales_at / 4 * 2);
        } else {
            uint32_t large[2], small[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t bits = pack_pair<false>(w[half * 2], w[half * 2 + 1]);
                const float2 back = unpack_pair<false>(bits);
                large[half] = transpose(bits);
                small[half] = transpose(pack_pair<false>(w[half * 2] - back.x, w[half * 2 + 1] - back.y));
            }
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint32_t product = multiply_f16(large[half], scales[block][half]);
                    const uint32_t rest = rest_f16(large[half], scales[block][half], product);
                    b[block][1][half] = product;
                    b[block][0][half] = fma_f16(small[half], scales[block][half], rest);
                }
            }
        }
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            uint32_t first[kWords], second[kWords], v[4];
            take_values(first, values[0], block);
            take_values(second, values[1], block);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                Codes::widen_values(v, first, second, n);
                float d[4] = {0.f, 0.f, 0.f, 0.f};
                multiply<false>(d, v, b[block][0][0], b[block][0][1]);
                multiply<false>(d, v, b[block][1][0], b[block][1][1]);
#pragma unroll
                for (int i = 0; i < 4; i++) this->o[0][block * 2 + n][i] += d[i];
            }
        }
    }

    // The unit of a block's sums.
    __device__ __forceinline__ float unit_of(int block) const {
        const uint32_t inverted = __float_as_uint(unpack_pair<false>(inverse[block]).x);
        return __uint_as_float(0x7f000000u - inverted) * kUnbias;
    }

    // As Mma::close_sums, of sums in the unit 1.
    __device__ __forceinline__ void close_sums(char* slot, float2* to, bool exist, bool is_last) {
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            const float unit = unit_of(block);
#pragma unroll
            for (int i = 0; i < 8; i++) this->o[0][block * 2 + i / 4][i % 4] *= unit;
        }
        this->l[0][0] *= kUnbias, this->l[0][1] *= kUnbias;
        Base::close_sums(slot, to, exist, is_last);
        if (!is_last) return;
        // `close` finds the unit 1, and sums of weights with their bias.
        this->l[0][0] /= kUnbias, this->l[0][1] /= kUnbias;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) inverse[block] = pack_pair<false>(kUnbias, kUnbias);
    }

    // As Mma::close, with the dims where they belong.
    __device__ __forceinline__ void close(char* shared, float* to) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float sum[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] = this->l[0][i] * kUnbias;
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 4);
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 8);
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 16);
        }
        if (lane < 4) {
            float* state = Base::of_row(shared, warp, 0);
            *reinterpret_cast<float2*>(state) = make_float2(this->m[0][0], this->m[0][1]);
            *reinterpret_cast<float2*>(state + S::kWarps * S::kRows) = make_float2(sum[0], sum[1]);
        }
        const int begin = scales_at / 4 * 2;
        float* at = to + lane % 4 * 2 * S::kPitchO;
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            const float unit = unit_of(block);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int element = Codes::element_of(i / 2, Codes::first_place(begin, block));
                const float x = this->o[0][block * 2 + i / 4][i % 4] * unit;
                at[i % 2 * S::kPitchO + block * 32 + element] = bad >> (block * 2 + i % 2) & 1 ? not_a_number() : x;
            }
        }
    }
};

}  // namespace treeattn

#define TREEATTN_BLOCKS(DIM, NAME, TYPE)                                                                              \
    namespace treeattn {                                                                                              \
    using Blocks_d##DIM##_##NAME = InBlocks<DIM, TYPE>;                                                               \
    }                                                                                                                 \
    TREEATTN_TERMS_KERNEL(treeattn_decode_blocks_d##DIM##x##DIM##_r8_##NAME, treeattn::Blocks_d##DIM##_##NAME)
TREEATTN_BLOCKS(64, q8_0, kQ8_0)
TREEATTN_BLOCKS(64, q4_0, kQ4_0)
TREEATTN_BLOCKS(128, q8_0, kQ8_0)
TREEATTN_BLOCKS(128, q4_0, kQ4_0)

TREEATTN_TERMS_ABI(decode_blocks)
