// Decode on tensor cores over keys and values of any type, with scales, and with all that decode_terms.cu knows.
//
// fp8, int8, q8_0 and q4_0 rows come into shared memory as they are, whatever their address, and are widened to bf16 in
// registers, straight into the multiply's operands: the dims of a row may come in any order if those of q do, too. Lane
// (key g, column c) of K takes dims 8 c to 8 c + 7 of each block of 32, lane (dim g, key c) of V dims 4 g to 4 g + 3. Scales
// of blocks count where 32 dims are summed, or weights taken; those of keys and values likewise. All other types are read
// where they lie, and widened by way of shared memory.
#include "decode_mma.cuh"
#include "weigh.cuh"
#include "widen.cuh"

namespace treeattn {

template <int HeadDimQk, int HeadDimV>
struct Narrow : Mma<HeadDimQk, HeadDimV, 8, true, true, true, SlotRaw<HeadDimQk, HeadDimV>> {
    using Base = Mma<HeadDimQk, HeadDimV, 8, true, true, true, SlotRaw<HeadDimQk, HeadDimV>>;
    using typename Base::S;
    static constexpr int kBlocksV = HeadDimV / 32;

    SeenByAll all;

    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        Base::begin(p, shared);
        all.template begin<S>(p, shared);
    }
    // A tile that was widened: rows of bf16, 16 bytes apart in banks.
    static constexpr int kPitch16 = (HeadDimQk > HeadDimV ? HeadDimQk : HeadDimV) * 2 + 16;
    static_assert(kTile * kPitch16 <= S::kSlotBytes, "a slot holds a widened tile");
    static_assert(Base::kWeightParts == 3, "weights of any size");

    // Writes the item's query tile to shared memory, one warp a row, its dims in the order of K's.
    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        const int lane = threadIdx.x % 32;
        int* bounds = reinterpret_cast<int*>(shared + S::kRowAt);
        float* scales = reinterpret_cast<float*>(bounds + S::kRows);
#pragma unroll 1
        for (int row = threadIdx.x / 32; row < S::kRows; row += S::kWarps) {
            const int packed = item.row_tile * S::kRows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            const char* from =
                static_cast<const char*>(p.q) + (item.first_token + token) * p.q_stride[0] + head * p.q_stride[1];
            stage_row(p, row < rows ? from : nullptr, shared + S::kQueryAt + row * Base::kPitchQ);
            if (lane == 0) {
                bounds[row] = INT32_MAX;
                scales[row] = row < rows ? p.scale * kLog2E : 0.f;
            }
        }
        stage_terms_of<S>(p, item, shared, rows);
    }

    static __device__ __noinline__ void stage_row(const DecodeParams& p, const char* from, char* to) {
        const int lane = threadIdx.x % 32;
        float x[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
        if (from != nullptr && lane * 8 < p.head_dim_qk) {
            load_eight(x, from + lane * 8 * p.q_stride[2], p.q_stride[2], p.q_dtype);
        }
        const int terms = Base::query_parts(p);
        // Columns 2 c of each of the block's four groups of eight.
        to += (lane / 4 * 32 + lane % 4 * 2) * 2;
#pragma unroll 1
        for (int part = 0; part < terms; part++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t bits = Base::take_term(x[2 * i], x[2 * i + 1]);
                if (lane * 8 < HeadDimQk) *reinterpret_cast<uint32_t*>(to + part * Base::kPartBytes + i * 16) = bits;
            }
        }
    }

    // The products of the tile's keys, added to s. `key`: where rows lane / 4 and lane / 4 + 8 of K lie in shared memory.
    template <Bytes Kind>
    static __device__ __forceinline__ void add_scores(const DecodeParams& p, float (&s)[4], const char* shared,
                                                      const uint32_t (&key)[2]) {
        const int lane = threadIdx.x % 32, c = lane % 4;
        const int32_t dtype = terms_of(p).k_dtype;
        const Blocks blocks(dtype);
        const Float8 f8(dtype);
        const uint32_t q_address =
            shared_address(shared + S::kQueryAt) + lane % 8 * Base::kPitchQ + lane / 8 * 16;
        const int parts = Base::query_parts(p), count = (p.head_dim_qk + 31) / 32;
#pragma unroll 2
        for (int block = 0; block < count; block++) {
            const bool inside = block * 32 + c * 8 < p.head_dim_qk;
            uint32_t wide[2][4];
            uint2 words[2];
            float scale[2] = {1.f, 1.f};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if constexpr (Kind == Bytes::kBf16) {
                    const uint32_t at = key[half] + block * 64 + c * 16;
#pragma unroll
                    for (int i = 0; i < 4; i++) wide[half][i] = load_shared(at + i * 4);
                } else {
                    const uint32_t begin = key[half] + block * blocks.step;
                    if (Kind != Bytes::kFloat8 && blocks.scaled) scale[half] = load_scale(begin);
                    if constexpr (Kind == Bytes::kNibbles) {
                        const uint2 both = load_bytes8(begin + 2 + c % 2 * 8);
                        words[half] = make_uint2(both.x >> c / 2 * 4 & 0x0f0f0f0fu, both.y >> c / 2 * 4 & 0x0f0f0f0fu);
                    } else {
                        words[half] = load_bytes8(begin + blocks.at + c * 8);
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        wide[half][i] =
                            widen_neighbours<Kind, false>(i < 2 ? words[half].x : words[half].y, i % 2, f8);
                    }
                }
            }
            if constexpr (Kind == Bytes::kFloat8) {
                const uint32_t odd = f8.not_finite(words[0].x) | f8.not_finite(words[0].y) | f8.not_finite(words[1].x) |
                                     f8.not_finite(words[1].y);
                if (__any_sync(kAllLanes, odd != 0)) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const uint2& of = words[i / 4];
                        wide[i / 4][i % 4] = widen_neighbours<Kind, true>(i % 4 < 2 ? of.x : of.y, i % 2, f8);
                    }
                }
            }
            // Past the head dim, which ends in the last block.
            if (block * 32 + 32 > p.head_dim_qk) {
#pragma unroll
                for (int i = 0; i < 8; i++) wide[i / 4][i % 4] = inside ? wide[i / 4][i % 4] : 0;
            }
            const uint32_t k0[4] = {wide[0][0], wide[1][0], wide[0][1], wide[1][1]};
            const uint32_t k1[4] = {wide[0][2], wide[1][2], wide[0][3], wide[1][3]};
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
            const auto add_part = [&](int part) {
                uint32_t q[4];
                load_matrices(q, q_address + part * Base::kPartBytes + block * 64);
                float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
                multiply<true>(even, k0, q[0], q[1]);
                multiply<true>(odd, k1, q[2], q[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += even[i] + odd[i];
            };
            // Small terms first.
#pragma unroll 1
            for (int part = parts - 1; part > 0; part--) add_part(part);
            add_part(0);
#pragma unroll
            for (int i = 0; i < 4; i++) s[i] = fmaf(sum[i], scale[i / 2], s[i]);
        }
    }

    // Where the rows of V that this lane multiplies lie in shared memory.
    struct Values {
        uint32_t key[4];    // rows 2 c, 2 c + 1, 2 c + 8, 2 c + 9
        uint32_t weighs[2]; // rows lane / 4, lane / 4 + 8, whose weights this lane has
        uint32_t skipped;   // one bit a key that is taken for zeros
    };

    // What lane / 4's dims of a block are in a row, one word, or two of a widened tile.
    template <Bytes Kind>
    static __device__ __forceinline__ uint2 load_values4(uint32_t row, int block, const Blocks& blocks) {
        const int g = threadIdx.x % 32 / 4;
        if constexpr (Kind == Bytes::kBf16) {
            const uint32_t at = row + block * 64 + g * 8;
            return make_uint2(load_shared(at), load_shared(at + 4));
        } else if constexpr (Kind == Bytes::kNibbles) {
            const uint32_t word = load_bytes4(row + block * blocks.step + 2 + g % 4 * 4);
            return make_uint2(word >> g / 4 * 4 & 0x0f0f0f0fu, 0);
        } else {
            return make_uint2(load_bytes4(row + block * blocks.step + blocks.at + g * 4), 0);
        }
    }

    // Adds values weighted by w to o.
    template <Bytes Kind>
    __device__ __forceinline__ void add_values(const DecodeParams& p, const float (&w)[4], const Values& values,
                                               uint32_t seen) {
        const int lane = threadIdx.x % 32, c = lane % 4, g = lane / 4;
        const int32_t dtype = terms_of(p).v_dtype;
        const Blocks blocks(dtype);
        const Float8 f8(dtype);
        constexpr bool kMayScale = Kind == Bytes::kInt8 || Kind == Bytes::kNibbles;
        const int count = (p.head_dim_v() + 31) / 32;
        uint32_t b[3][2];
        Base::split_weights(b, w);
#pragma unroll
        for (int block = 0; block < kBlocksV; block++) {
            if (block >= count) break;
            if (kMayScale && blocks.scaled) {
                float scaled[4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float scale = load_scale(values.weighs[half] + block * blocks.step);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const bool sees = seen >> (half * 2 + i) & 1;
                        scaled[half * 2 + i] = sees ? w[half * 2 + i] * scale : 0.f;
                    }
                }
                Base::split_weights(b, scaled);
            }
            const bool inside = block * 32 + g * 4 < p.head_dim_v();
            uint2 words[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                words[n] = load_values4<Kind>(values.key[n], block, blocks);
                const bool counts = inside && !(values.skipped >> (2 * c + n % 2 + n / 2 * 8) & 1);
                words[n].x = counts ? words[n].x : 0, words[n].y = counts ? words[n].y : 0;
            }
            uint32_t wide[2][4];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint2 &first = words[i % 4 / 2 * 2], &second = words[i % 4 / 2 * 2 + 1];
                const int dim = i / 4 * 2 + i % 2;
                if constexpr (Kind == Bytes::kBf16) {
                    wide[i / 4][i % 4] = pick_bytes(dim < 2 ? first.x : first.y, dim < 2 ? second.x : second.y,
                                                    dim % 2 ? 0x7632u : 0x5410u);
                } else {
                    wide[i / 4][i % 4] = widen_across<Kind, false>(first.x, second.x, dim, f8);
                }
            }
            if constexpr (Kind == Bytes::kFloat8) {
                const uint32_t odd = f8.not_finite(words[0].x) | f8.not_finite(words[1].x) | f8.not_finite(words[2].x) |
                                     f8.not_finite(words[3].x);
                if (__any_sync(kAllLanes, odd != 0)) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        wide[i / 4][i % 4] = widen_across<Kind, true>(
                            words[i % 4 / 2 * 2].x, words[i % 4 / 2 * 2 + 1].x, i / 4 * 2 + i % 2, f8);
                    }
                }
            }
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const uint32_t(&v)[4] = wide[step];
                float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int part = 0; part < 3; part++) multiply<true>(d, v, b[part][0], b[part][1]);
                const int n = block * 2 + step;
#pragma unroll
                for (int i = 0; i < 4; i++) this->o[0][n][i] += d[i];
            }
        }
    }

    // The keys of the tile that have a value which is not finite, one bit each; of rows that lie where `row` says.
    template <Bytes Kind>
    static __device__ __forceinline__ uint32_t keys_not_finite(const DecodeParams& p, uint32_t row) {
        if constexpr (Kind == Bytes::kInt8 || Kind == Bytes::kNibbles) {
            return 0;
        } else {
            const int half = threadIdx.x % 32 / 16, dim = p.head_dim_v();
            const Float8 f8(terms_of(p).v_dtype);
            bool found = false;
#pragma unroll 1
            for (int d = half * 4; d < dim; d += 8) {
                if constexpr (Kind == Bytes::kBf16) {
                    found |= pair_not_finite(load_shared(row + d * 2), true);
                    found |= pair_not_finite(load_shared(row + d * 2 + 4), true);
                } else {
                    found |= f8.not_finite(load_bytes4(row + d)) != 0;
                }
            }
            const uint32_t lanes = __ballot_sync(kAllLanes, found);
            return (lanes | lanes >> 16) & 0xffffu;
        }
    }

    // Adds such keys row by row where they are seen: a zero weight would not silence them.
    template <Bytes Kind>
    __device__ __forceinline__ void add_key_by_key(const DecodeParams& p, const float (&w)[4], uint32_t seen,
                                                   const uint64_t* rows, uint32_t keys) {
        const int lane = threadIdx.x % 32;
        const Blocks blocks(terms_of(p).v_dtype);
        const Float8 f8(terms_of(p).v_dtype);
#pragma unroll 1
        while (keys != 0) {
            const int key = __ffs(keys) - 1;
            keys &= keys - 1;
            const int from = key % 8 * 4 + lane % 4;
            const uint32_t their_seen = __shfl_sync(kAllLanes, seen, from);
            float mine[2];
            bool sees[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float low = __shfl_sync(kAllLanes, w[i], from), high = __shfl_sync(kAllLanes, w[2 + i], from);
                mine[i] = key < 8 ? low : high;
                sees[i] = their_seen >> (key / 8 * 2 + i) & 1;
            }
            const uint32_t row = static_cast<uint32_t>(rows[key]);
#pragma unroll
            for (int block = 0; block < kBlocksV; block++) {
                if (block * 32 >= p.head_dim_v()) break;
                const uint2 words = load_values4<Kind>(row, block, blocks);
#pragma unroll
                for (int dim = 0; dim < 4; dim++) {
                    float x;
                    if constexpr (Kind == Bytes::kBf16) {
                        const float2 pair = unpack_pair<true>(dim < 2 ? words.x : words.y);
                        x = dim % 2 ? pair.y : pair.x;
                    } else {
                        x = unpack_pair<true>(widen_across<Kind, true>(words.x, words.x, dim, f8)).x;
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& to = this->o[0][block * 2 + dim / 2][dim % 2 * 2 + i];
                        if (sees[i]) to = fmaf(mine[i], x, to);
                    }
                }
            }
        }
    }

    // Widens the rows of a tile, of which `live` are there, into its slot: one bf16 term of each element.
    static __device__ __noinline__ void widen_tile(const DecodeParams& p, const uint64_t* rows, uint32_t slot, bool of_v,
                                                   int term, int live) {
        const int lane = threadIdx.x % 32, dim = of_v ? p.head_dim_v() : p.head_dim_qk;
        const int units = (dim + 31) / 32 * 4;
        const int32_t dtype = of_v ? terms_of(p).v_dtype : terms_of(p).k_dtype;
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < kTile * units; i += 32) {
            const int row = i / units, unit = i - row * units;
            float x[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
            if (row < live && unit * 8 < dim) {
                load_values(x, reinterpret_cast<const char*>(rows[row]), of_v ? p.v_stride[3] : p.k_stride[3], dtype,
                            unit * 8);
            }
#pragma unroll 1
            for (int n = 0; n < 8; n += 2) {
                store_shared(slot + row * kPitch16 + unit * 16 + n * 2,
                             bf16_term(x[n], term) | bf16_term(x[n + 1], term) << 16);
            }
        }
        __syncwarp();
    }

    template <Bytes Kind>
    __device__ __forceinline__ void take_values(const DecodeParams& p, const Tile& tile, const float (&w)[4],
                                                uint32_t seen, const uint64_t* rows, bool may_be_not_finite) {
        const int lane = threadIdx.x % 32, c = lane % 4;
        Values values;
        const int mine[4] = {2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9};
#pragma unroll
        for (int n = 0; n < 4; n++) values.key[n] = static_cast<uint32_t>(rows[mine[n]]);
        values.weighs[0] = static_cast<uint32_t>(rows[lane / 4]);
        values.weighs[1] = static_cast<uint32_t>(rows[lane / 4 + 8]);
        // What lies in the places of keys that there are not is anything.
        values.skipped = 0xffffu << tile.keys;
        if (may_be_not_finite) {
            const uint32_t keys =
                keys_not_finite<Kind>(p, static_cast<uint32_t>(rows[lane % 16])) & ~values.skipped;
            if (keys != 0) {
                add_key_by_key<Kind>(p, w, seen, rows, keys);
                values.skipped |= keys;
            }
        }
        add_values<Kind>(p, w, values, seen);
    }

    __device__ __forceinline__ void attend(const DecodeParams& p, const Tile& tile, char* shared, uint32_t slot,
                                           char* stage) {
        const Terms& t = terms_of(p);
        const int lane = threadIdx.x % 32, g = lane / 4;
        RawRows& table = *reinterpret_cast<RawRows*>(stage + S::kRowsAt);
        const bool raw = !(p.flags & kFlagNoBulk);
        const float* scales =
            reinterpret_cast<const float*>(reinterpret_cast<const int*>(shared + S::kRowAt) + S::kRows) + lane % 4 * 2;
        const float scale[1][2] = {{scales[0], scales[1]}};
        const TileTerms<1> terms = ask_terms<S, 1>(p, all, tile, shared, stage);

        float s[1][4] = {{0.f, 0.f, 0.f, 0.f}}, x[1][4];
        if (raw) {
            const uint32_t key[2] = {static_cast<uint32_t>(table.at[g]), static_cast<uint32_t>(table.at[g + 8])};
            switch (bytes_of(t.k_dtype)) {
                case Bytes::kFloat8: add_scores<Bytes::kFloat8>(p, s[0], shared, key); break;
                case Bytes::kInt8: add_scores<Bytes::kInt8>(p, s[0], shared, key); break;
                default: add_scores<Bytes::kNibbles>(p, s[0], shared, key);
            }
        } else {
            const uint32_t key[2] = {slot + g * kPitch16, slot + (g + 8) * kPitch16};
#pragma unroll 1
            for (int term = terms_of_type(t.k_dtype) - 1; term >= 0; term--) {
                widen_tile(p, table.at, slot, false, term, tile.keys);
                add_scores<Bytes::kBf16>(p, s[0], shared, key);
            }
        }
        if (t.k_scale != nullptr) {
            const float own[2] = {finite_or_nan(table.scale[g]), finite_or_nan(table.scale[g + 8])};
#pragma unroll
            for (int i = 0; i < 4; i++) s[0][i] *= own[i / 2];
        }
        weigh_tile(p, terms, scale, s, x, static_cast<Base&>(*this));
        if (__any_sync(kAllLanes, terms.bad_position)) {
            if (lane == 0) report_positions<S>(p, tile, shared);
            this->poison();
        }
        if (t.v_scale != nullptr) {
            const float own[2] = {finite_or_nan(table.scale[kTile + g]), finite_or_nan(table.scale[kTile + g + 8])};
#pragma unroll
            for (int i = 0; i < 4; i++) x[0][i] = terms.seen >> i & 1 ? x[0][i] * own[i / 2] : 0.f;
        }
        const bool hidden = __any_sync(kAllLanes, terms.seen != 0xfu);
        const uint64_t* rows = table.at + kTile;
        if (raw) {
            switch (bytes_of(t.v_dtype)) {
                case Bytes::kFloat8: take_values<Bytes::kFloat8>(p, tile, x[0], terms.seen, rows, hidden); break;
                case Bytes::kInt8: take_values<Bytes::kInt8>(p, tile, x[0], terms.seen, rows, false); break;
                default: take_values<Bytes::kNibbles>(p, tile, x[0], terms.seen, rows, false);
            }
        } else {
            const int count = terms_of_type(t.v_dtype);
#pragma unroll 1
            for (int term = 0; term < count; term++) {
                widen_tile(p, rows, slot, true, term, tile.keys);
                // From here on the table says where the widened rows lie, to the end of the loop.
                const uint64_t before = table.at[lane];
                __syncwarp();
                if (lane >= kTile) table.at[lane] = slot + (lane - kTile) * kPitch16;
                __syncwarp();
                take_values<Bytes::kBf16>(p, tile, x[0], terms.seen, rows, hidden && term == 0);
                __syncwarp();
                if (lane >= kTile) table.at[lane] = before;
            }
        }
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
        float* at = to + lane % 4 * 2 * S::kPitchO + lane / 4 * 4;
#pragma unroll
        for (int n = 0; n < Base::kStepsV; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                at[i % 2 * S::kPitchO + n / 2 * 32 + n % 2 * 2 + i / 2] = this->o[0][n][i];
            }
        }
    }
};

}  // namespace treeattn

#define TREEATTN_NARROW(QK, V)                                                                                        \
    namespace treeattn {                                                                                              \
    using Narrow_d##QK##x##V = Narrow<QK, V>;                                                                         \
    }                                                                                                                 \
    TREEATTN_TERMS_KERNEL(treeattn_decode_narrow_d##QK##x##V##_r8, treeattn::Narrow_d##QK##x##V)
TREEATTN_NARROW(64, 64)
TREEATTN_NARROW(128, 128)
TREEATTN_NARROW(256, 256)

TREEATTN_TERMS_ABI(decode_narrow)
