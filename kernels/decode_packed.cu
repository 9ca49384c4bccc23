// Decode on tensor cores over keys and values of one byte an element, f8_e4m3, f8_e5m2 or int8, with scales, and with all that
// decode_terms.cu knows; rows of 64 or 128 bytes that begin at multiples of 16.
//
// Bytes go from shared memory to registers 16 at a time and are widened to f16, which they are exactly, straight into the
// multiply's operands. The dims of a row may come in any order there if those of the other side do too: lane (key g, column c)
// of K has units c and c + 4 of a row, a word for each multiply; lane (dim g, key c) of V has as many neighbouring bytes of
// four rows as there are multiplies, twice. Query and weights are those of decode_mma.cuh for f16. The scales of values count
// in the weights, over a power of two that all weights of a warp share and that grows with them.
#include "decode_mma.cuh"
#include "packed.cuh"
#include "weigh.cuh"
#include "widen.cuh"

namespace treeattn {

template <int Dim, int32_t Type>
struct Packed : Mma<Dim, Dim, 8, false, false, true, SlotPacked<Dim>> {
    using Base = Mma<Dim, Dim, 8, false, false, true, SlotPacked<Dim>>;
    using typename Base::S;
    using Base::kStepsQk;
    using Base::kStepsV;
    static constexpr int kLaneBytes = Dim / 8;  // of a row of V
    using Words = uint32_t[kLaneBytes / 4];

    SeenByAll all;
    float unit;  // that o is in; 0: of nothing yet

    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        Base::stage_query(p, item, shared, rows);
        stage_terms_of<S>(p, item, shared, rows);
    }

    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        Base::begin(p, shared);
        all.template begin<S>(p, shared);
        unit = terms_of(p).v_scale == nullptr ? 1.f / kHalfBias : 0.f;
    }

    // The products of multiplies first to first + 3 of one part of the query, words[key half][multiply].
    static __device__ __forceinline__ void add_products(float (&s)[4], const uint32_t (&words)[2][4], uint32_t q_address) {
        float d[4][4];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const uint4 q = load_shared_four(q_address + n * 8);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t first = words[0][n + i], second = words[1][n + i];
                const uint32_t k[4] = {widen_bytes<Type, false>(first), widen_bytes<Type, false>(second),
                                       widen_bytes<Type, true>(first), widen_bytes<Type, true>(second)};
                float(&sum)[4] = d[n + i];
                sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
                multiply<false>(sum, k, i == 0 ? q.x : q.z, i == 0 ? q.y : q.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] += (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
    }

    static __device__ __forceinline__ void scores(const DecodeParams& p, float (&s)[4], const char* shared,
                                                  uint32_t slot) {
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
        const uint32_t q_address = shared_address(shared + S::kQueryAt) + g * Base::kPitchQ + c * 32;
        const int parts = Base::query_parts(p);
        uint32_t words[Dim / 64][2][4];
#pragma unroll
        for (int n = 0; n < Dim / 64; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 four = load_shared_four(slot + S::RowsK::template at<false>(g + half * 8, c + n * 4));
                uint32_t(&to)[4] = words[n][half];
                to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
            }
        }
        s[0] = s[1] = s[2] = s[3] = 0.f;
        // Small terms first.
        if (parts > 1) {
#pragma unroll 1
            for (int part = parts - 1; part > 0; part--) {
#pragma unroll
                for (int n = 0; n < Dim / 64; n++) {
                    add_products(s, words[n], q_address + part * Base::kPartBytes + n * 128);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < Dim / 64; n++) add_products(s, words[n], q_address + n * 128);
    }

    // A lane's bytes of a row of V.
    static __device__ __forceinline__ void load_values(Words& to, uint32_t slot, int row) {
        const int g = threadIdx.x % 32 / 4;
        const uint32_t at =
            slot + S::kVAt + S::RowsV::template at<true>(row, g * kLaneBytes / 16) + g * kLaneBytes % 16;
        if constexpr (kLaneBytes == 16) {
            const uint4 four = load_shared_four(at);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
            const uint2 two = load_shared_two(at);
            to[0] = two.x, to[1] = two.y;
        }
    }

    // Adds values weighted by w, which is in the unit of o.
    __device__ __forceinline__ void accumulate(const float (&w)[4], uint32_t slot) {
        const int c = threadIdx.x % 4;
        uint32_t b[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = w[i * 2], y = w[i * 2 + 1];
#pragma unroll
            for (int part = 1; part >= 0; part--) {
                const uint32_t bits = pack_pair<false>(x, y);
                const float2 back = unpack_pair<false>(bits);
                x -= back.x, y -= back.y;
                b[part][i] = transpose(bits);
            }
        }
        Words v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) load_values(v[i], slot, 2 * c + i % 2 + i / 2 * 8);
#pragma unroll
        for (int n = 0; n < kStepsV; n++) {
            // Of two keys each, the bytes of two dims, side by side.
            const uint32_t which = n % 2 ? 0x7362u : 0x5140u;
            const uint32_t low = pick_bytes(v[0][n / 2], v[1][n / 2], which);
            const uint32_t high = pick_bytes(v[2][n / 2], v[3][n / 2], which);
            const uint32_t a[4] = {widen_bytes<Type, false>(low), widen_bytes<Type, true>(low),
                                   widen_bytes<Type, false>(high), widen_bytes<Type, true>(high)};
            float d[4] = {0.f, 0.f, 0.f, 0.f};
            multiply<false>(d, a, b[0][0], b[0][1]);
            multiply<false>(d, a, b[1][0], b[1][1]);
#pragma unroll
            for (int i = 0; i < 4; i++) this->o[0][n][i] += d[i];
        }
    }

    // The keys of the tile that have a value which is not finite, one bit each.
    static __device__ __forceinline__ uint32_t keys_not_finite(uint32_t slot) {
        const int lane = threadIdx.x % 32;
        const uint32_t row = slot + S::kVAt + lane % 16 * Dim + lane / 16 * (Dim / 2);
        const Float8 format(Type);
        uint32_t found = 0;
#pragma unroll 1
        for (int i = 0; i < Dim / 2; i += 4) found |= format.not_finite(load_shared(row + i));
        const uint32_t lanes = __ballot_sync(kAllLanes, found != 0);
        return (lanes | lanes >> 16) & 0xffffu;
    }

    // Adds such keys row by row where they are seen, and clears them: a zero weight would not silence them.
    __device__ __forceinline__ void add_key_by_key(const float (&w)[4], uint32_t seen, uint32_t slot, uint32_t keys) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        while (keys != 0) {
            const int key = __ffs(keys) - 1;
            keys &= keys - 1;
            const int from = key % 8 * 4 + lane % 4;
            const uint32_t their_seen = __shfl_sync(kAllLanes, seen, from);
            float weight[2];
            bool sees[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float low = __shfl_sync(kAllLanes, w[i], from), high = __shfl_sync(kAllLanes, w[2 + i], from);
                weight[i] = key < 8 ? low : high;
                sees[i] = their_seen >> (key / 8 * 2 + i) & 1;
            }
            Words v;
            load_values(v, slot, key);
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
                const uint32_t pair = n % 2 ? widen_bytes<Type, true>(v[n / 2]) : widen_bytes<Type, false>(v[n / 2]);
                const float2 x = unpack_pair<false>(pair);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& to = this->o[0][n][i];
                    if (sees[i % 2]) to = fmaf(weight[i % 2], i < 2 ? x.x : x.y, to);
                }
            }
            __syncwarp();
            for (int i = lane * 4; i < Dim; i += 128) store_shared(slot + S::kVAt + key * Dim + i, 0);
            __syncwarp();
        }
    }

    // Turns weights into those of values without their scales, in the unit of o, which grows where it has to.
    __device__ __forceinline__ void scale_weights(float (&w)[4], const TileTerms<1>& terms, const Tile& tile,
                                                  const char* stage) {
        const int g = threadIdx.x % 32 / 4;
        const float* scales = reinterpret_cast<const float*>(stage + S::kRowsAt) + kTile;
        float own[2], top = 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            own[half] = finite_or_nan(scales[g + half * 8]);
            // What lies in the places of keys that there are not is anything.
            if (g + half * 8 < tile.keys) top = fmaxf(top, fabsf(own[half]));
        }
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 4));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 8));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
        // The largest power of two in the largest scale becomes 2^14, so that weights stay within f16.
        const uint32_t power = max(__float_as_uint(top) & 0x7f800000u, 0x07800000u);
        const float now = fmaxf(unit, __uint_as_float(power - (14u << 23)));
        const float inverse = __uint_as_float(0x7f000000u - __float_as_uint(now));
        if (__builtin_expect(__any_sync(kAllLanes, now != unit), 0)) {
            const float shrink = unit * inverse;
            unit = now;
#pragma unroll
            for (int n = 0; n < kStepsV; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) this->o[0][n][i] *= shrink;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = terms.seen >> i & 1 ? w[i] * (own[i / 2] * inverse) : 0.f;
    }

    __device__ __forceinline__ void attend(const DecodeParams& p, const Tile& tile, char* shared, uint32_t slot,
                                           const char* stage) {
        const Terms& t = terms_of(p);
        const int lane = threadIdx.x % 32, g = lane / 4;
        const float* row_scales =
            reinterpret_cast<const float*>(reinterpret_cast<const int*>(shared + S::kRowAt) + S::kRows) + lane % 4 * 2;
        const float scale[1][2] = {{row_scales[0], row_scales[1]}};
        const TileTerms<1> terms = ask_terms<S, 1>(p, all, tile, shared, stage);
        float s[1][4], x[1][4];
        scores(p, s[0], shared, slot);
        if (t.k_scale != nullptr) {
            const float* scales = reinterpret_cast<const float*>(stage + S::kRowsAt);
            const float own[2] = {finite_or_nan(scales[g]), finite_or_nan(scales[g + 8])};
#pragma unroll
            for (int i = 0; i < 4; i++) s[0][i] *= own[i / 2];
        }
        weigh_tile(p, terms, scale, s, x, static_cast<Base&>(*this));
        if (__any_sync(kAllLanes, terms.bad_position)) {
            if (lane == 0) report_positions<S>(p, tile, shared);
            this->poison();
        }
        if (t.v_scale != nullptr) {
            scale_weights(x[0], terms, tile, stage);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) x[0][i] *= kHalfBias;
        }
        if (Type != kInt8 && __any_sync(kAllLanes, terms.seen != 0xfu)) {
            const uint32_t keys = keys_not_finite(slot);
            if (keys != 0) add_key_by_key(x[0], terms.seen, slot, keys);
        }
        accumulate(x[0], slot);
    }

    // As Mma::close_sums, of sums in the unit 1.
    __device__ __forceinline__ void close_sums(char* slot, float2* to, bool exist, bool is_last) {
#pragma unroll
        for (int n = 0; n < kStepsV; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) this->o[0][n][i] *= unit;
        }
        Base::close_sums(slot, to, exist, is_last);
        if (is_last) unit = 1.f;
    }

    // As Mma::close, with the dims where they belong.
    __device__ __forceinline__ void close(char* shared, float* to) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float sum[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] = this->l[0][i];
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 4);
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 8);
            sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 16);
        }
        if (lane < 4) {
            float* state = Base::of_row(shared, warp, 0);
            *reinterpret_cast<float2*>(state) = make_float2(this->m[0][0], this->m[0][1]);
            *reinterpret_cast<float2*>(state + S::kWarps * S::kRows) = make_float2(sum[0], sum[1]);
        }
        float* at = to + lane % 4 * 2 * S::kPitchO + lane / 4 * kLaneBytes;
#pragma unroll
        for (int n = 0; n < kStepsV; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) at[i % 2 * S::kPitchO + n * 2 + i / 2] = this->o[0][n][i] * unit;
        }
    }
};

}  // namespace treeattn

#define TREEATTN_PACKED(DIM, NAME, TYPE)                                                                              \
    namespace treeattn {                                                                                              \
    using Packed_d##DIM##_##NAME = Packed<DIM, TYPE>;                                                                 \
    }                                                                                                                 \
    TREEATTN_TERMS_KERNEL(treeattn_decode_packed_d##DIM##x##DIM##_r8_##NAME, treeattn::Packed_d##DIM##_##NAME)
TREEATTN_PACKED(64, f8_e4m3, kF8E4M3)
TREEATTN_PACKED(64, f8_e5m2, kF8E5M2)
TREEATTN_PACKED(64, int8, kInt8)
TREEATTN_PACKED(128, f8_e4m3, kF8E4M3)
TREEATTN_PACKED(128, f8_e5m2, kF8E5M2)
TREEATTN_PACKED(128, int8, kInt8)

TREEATTN_TERMS_ABI(decode_packed)
