// Decode on CUDA cores: 2 packed query rows a tile, for heads that share their keys with nobody.
//
// Tensor cores would be busy with empty rows there, and what limits the kernel is how fast keys come. They come by
// plain 16-byte loads into registers, at the highest rate that memory gives, and are used once.
//
// What a tile of 16 keys costs a warp in instructions, at 128 dims and one row: 128 to make fp32 of K and V and 128 to
// multiply; 30 to sum the scores over lanes, 16 keys at once; some 50 for the weights and to hand them round; 16 loads, with
// 80 for their addresses; 100 around them. That is 33 a key, and 50 with two rows. At 4.55 TB/s a multiprocessor gets a key
// (512 bytes) every 25 clocks, and could issue 100 instructions meanwhile.
//
// In flight a multiprocessor: up to 12 warps * 8 KiB. A warp holds the tile that it attends, 64 registers at 128 dims; K of the
// next one is asked for when the scores are made, V when the output is. A warp that waits some 1,400 clocks for a tile and
// computes for 900 takes 8 KiB every 2,300: 12 of them 43 bytes a clock, where 20 come.
#include "decode.cuh"
#include "loads.cuh"

namespace treeattn {

// Warps a block and blocks a multiprocessor: 168 registers a thread (128 would not do for two rows), 255 for wide rows.
constexpr int kFmaWarps = 6, kFmaBlocks = 2;
constexpr int kFmaWideWarps = 8, kFmaWideBlocks = 1;
constexpr int kFmaRows = 2;

template <int HeadDimQk, int HeadDimV, bool Bf16K, bool Bf16V>
struct Fma {
    static constexpr bool kWide = HeadDimQk > 128;
    static constexpr int kLanesK = HeadDimQk <= 64 ? 8 : HeadDimQk <= 128 ? 16 : 32;
    static constexpr int kLanesV = HeadDimV <= 64 ? 8 : HeadDimV <= 128 ? 16 : 32;
    static constexpr int kLoadsK = kLanesK / 2, kLoadsV = kLanesV / 2;  // rows of a team
    static constexpr int kQueryBytes = kLanesK * 32;  // of a row, fp32: each lane's low four columns, then the high
    using S = LoadShape<HeadDimQk, HeadDimV, kFmaRows, kWide ? kFmaWideWarps : kFmaWarps,
                        kWide ? kFmaWideBlocks : kFmaBlocks, kFmaRows * kQueryBytes>;
    using Loads = LoadWalk<S>;
    static_assert(kLanesK == Loads::lanes_of(HeadDimQk) && kLanesV == Loads::lanes_of(HeadDimV), "as they are loaded");

    // Row i of this lane's team, columns 8 (lane % kLanes*) and on.
    uint4 k[kLoadsK], v[kLoadsV];
    // After scores(): of key lane / 2.
    float score[kFmaRows];
    // Columns as those of v, over the keys of this lane's team. l of key lane / 2 of every tile.
    float o[kFmaRows][8];
    float m[kFmaRows], l[kFmaRows];

    // Writes the item's query tile to shared memory, one warp a row.
    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
        if (row >= kFmaRows) return;
        const int packed = item.row_tile * kFmaRows + row;
        const int token = item.tokens == 1 ? 0 : packed / p.group;
        const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
        float x[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
        if (row < rows && lane * 8 < p.head_dim_qk) {
            const char* from =
                static_cast<const char*>(p.q) + (item.first_token + token) * p.q_stride[0] + head * p.q_stride[1];
            load_eight(x, from + lane * 8 * p.q_stride[2], p.q_stride[2], p.q_dtype);
        }
        if (lane < kLanesK) {
            float4* to = reinterpret_cast<float4*>(shared + S::kQueryAt + row * kQueryBytes) + lane;
            to[0] = make_float4(x[0], x[1], x[2], x[3]);
            to[kLanesK] = make_float4(x[4], x[5], x[6], x[7]);
        }
        if (lane == 0) {
            reinterpret_cast<int*>(shared + S::kRowAt)[row] =
                row < rows ? last_visible(p, item.b, item.first_token, item.tokens, token) : INT32_MAX;
        }
    }

    __device__ __forceinline__ void begin() {
        // The tile before is of no use: without this its registers would be held through the merges.
#pragma unroll
        for (int i = 0; i < kLoadsK; i++) k[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < kLoadsV; i++) v[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < kFmaRows; r++) {
            m[r] = kNoMaximum, l[r] = 0.f;
#pragma unroll
            for (int c = 0; c < 8; c++) o[r][c] = 0.f;
        }
    }

    template <bool Bf16>
    static __device__ __forceinline__ void unpack(float (&x)[8], const uint4& bits) {
        const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = unpack_pair<Bf16>(word[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }

    // Sums each of x[0] .. x[N - 1] over the 2 N lanes of a team; of the sums its lanes 2 i and 2 i + 1 keep the i-th. With
    // N rows a team that is the one of key lane / 2.
    template <int N>
    static __device__ __forceinline__ float sum_over_lanes(const float (&x)[N]) {
        if constexpr (N == 1) {
            return x[0] + __shfl_xor_sync(kAllLanes, x[0], 1);
        } else {
            // Each lane gives away what its partner, N lanes off, keeps.
            const bool upper = threadIdx.x & N;
            float sum[N / 2];
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const float keep = upper ? x[N / 2 + i] : x[i], give = upper ? x[i] : x[N / 2 + i];
                sum[i] = keep + __shfl_xor_sync(kAllLanes, give, N);
            }
            return sum_over_lanes(sum);
        }
    }

    // Makes the scores of the tile; k is free then.
    template <int Rows>
    __device__ __forceinline__ void scores(const DecodeParams& p, const char* shared) {
        const float4* from = reinterpret_cast<const float4*>(shared + S::kQueryAt) + threadIdx.x % kLanesK;
        float4 low[Rows], high[Rows];
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            low[r] = from[r * 2 * kLanesK], high[r] = from[r * 2 * kLanesK + kLanesK];
        }
        float sum[Rows][kLoadsK];
#pragma unroll
        for (int i = 0; i < kLoadsK; i++) {
            float x[8];
            unpack<Bf16K>(x, k[i]);
#pragma unroll
            for (int r = 0; r < Rows; r++) {
                const float even = fmaf(high[r].z, x[6], fmaf(high[r].x, x[4], fmaf(low[r].z, x[2], low[r].x * x[0])));
                const float odd = fmaf(high[r].w, x[7], fmaf(high[r].y, x[5], fmaf(low[r].w, x[3], low[r].y * x[1])));
                sum[r][i] = even + odd;
            }
        }
        if (p.head_dim_qk < kLanesK * 8) {
            // The lanes past the head dim hold a part of K that is not theirs.
            const bool mine = static_cast<int>(threadIdx.x % kLanesK * 8) < p.head_dim_qk;
#pragma unroll
            for (int r = 0; r < Rows; r++) {
#pragma unroll
                for (int i = 0; i < kLoadsK; i++) sum[r][i] = mine ? sum[r][i] : 0.f;
            }
        }
#pragma unroll
        for (int r = 0; r < Rows; r++) score[r] = sum_over_lanes(sum[r]);
    }

    // As Mma::raise_maxima.
    template <int Rows>
    __device__ __forceinline__ void raise_maxima(const float (&x)[Rows]) {
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            float top = x[r];
#pragma unroll
            for (int d = 2; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
            const float now = fmaxf(m[r], ceilf(top)), shrink = power_of_two(m[r] - now);
            m[r] = now;
            l[r] *= shrink;
#pragma unroll
            for (int c = 0; c < 8; c++) o[r][c] *= shrink;
        }
    }

    // Weighs the tile's keys and adds their values; v is free then.
    template <int Rows>
    __device__ __forceinline__ void accumulate(const DecodeParams& p, const PlannedTile& tile, const char* shared, int b,
                                               uint32_t& fault) {
        const int key = threadIdx.x % 32 / 2;
        const float scale = p.scale * kLog2E;
        const bool by_position = is_bound_by_position(p);
        bool visible[Rows];
#pragma unroll
        for (int r = 0; r < Rows; r++) visible[r] = true;
        const int* bounds = reinterpret_cast<const int*>(shared + S::kRowAt);
        const bool masked =
            by_position || tile.keys < kTile || tile.base + kTile - 1 > uniform(min(bounds[0], bounds[1]));
        if (masked) {
            int position = tile.base + key;
            bool bad = false;
            if (by_position && key < tile.keys) {
                position = p.kv_position[b * p.kv_position_stride + position];
                bad = position < 0;
            }
            if (__any_sync(kAllLanes, bad)) {
                poison();
                fault = kFaultPosition;
            }
#pragma unroll
            for (int r = 0; r < Rows; r++) visible[r] = key < tile.keys && position <= bounds[r];
        }

        // The weight of a hidden key is less than nothing, so that not even a NaN is taken from its values.
        float x[Rows], weight[Rows];
        bool is_larger = false;
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            // A hidden score becomes -inf, whatever it was; x is in log2 units.
            x[r] = visible[r] ? score[r] * scale : -infinity();
            is_larger |= x[r] > m[r];
        }
        if (__any_sync(kAllLanes, is_larger)) raise_maxima(x);
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            const float s = visible[r] ? score[r] : -infinity();
            // As on tensor cores: the product unrounded, except where the score is hidden and where it is so large that
            // the largest, rounded, would be far from its own maximum.
            float power = fmaf(s, scale, -m[r]);
            if (fabsf(m[r]) >= kCoarse || s == -infinity()) power = x[r] - m[r];
            const float w = exp2_approx(power);
            l[r] += w;
            weight[r] = visible[r] ? w : -1.f;
        }

        // A tile's output is summed from zero: long sums drift less.
        float d[Rows][8];
        if (masked) {
            sum_values<Rows, true>(d, weight);
        } else {
            sum_values<Rows, false>(d, weight);
        }
#pragma unroll
        for (int r = 0; r < Rows; r++) {
#pragma unroll
            for (int c = 0; c < 8; c++) o[r][c] += d[r][c];
        }
    }

    // Masked: some weights may be less than nothing, and their values are not even looked at.
    template <int Rows, bool Masked>
    __device__ __forceinline__ void sum_values(float (&d)[Rows][8], const float (&weight)[Rows]) const {
#pragma unroll
        for (int i = 0; i < kLoadsV; i++) {
            float x[8];
            unpack<Bf16V>(x, v[i]);
#pragma unroll
            for (int r = 0; r < Rows; r++) {
                const float w = __shfl_sync(kAllLanes, weight[r], 2 * i, kLanesV);
                const bool take = !Masked || !(w < 0.f);
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    const float before = i == 0 ? 0.f : d[r][c];
                    d[r][c] = take ? fmaf(w, x[c], before) : before;
                }
            }
        }
    }

    // A sum that is not a number stays so, and makes the rows' results so.
    __device__ __forceinline__ void poison() {
#pragma unroll
        for (int r = 0; r < kFmaRows; r++) l[r] = not_a_number();
    }

    static constexpr int kSums = 9;  // over one maximum
    using Long = LongSums<S, kSums, kFmaRows>;
    static_assert(Long::kGroupFloats * 4 <= S::kCloseBytes, "sums of a row");

    // As Mma::close_sums.
    __device__ __forceinline__ void close_sums(char* memory, float2* to, bool exist, bool is_last) {
        float* const mine = reinterpret_cast<float*>(memory) + threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < kFmaRows; r++) {
#pragma unroll
            for (int c = 0; c < 8; c++) mine[c * 32] = o[r][c];
            mine[8 * 32] = l[r], mine[kSums * 32] = m[r];
            close_group<kSums>(mine, to + r * Long::kGroupFloats, exist, is_last);
#pragma unroll
            for (int c = 0; c < 8; c++) o[r][c] = is_last ? mine[c * 32] : 0.f;
            l[r] = is_last ? mine[8 * 32] : 0.f;
        }
    }

    // Writes the warp's maxima, sums and O.
    __device__ __forceinline__ void close(char* shared, float* to) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float* maxima = reinterpret_cast<float*>(shared + S::kStateAt);
#pragma unroll
        for (int r = 0; r < kFmaRows; r++) {
            float sum = l[r];
#pragma unroll
            for (int d = 2; d < 32; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
            if (lane == 0) {
                maxima[warp * kFmaRows + r] = m[r];
                maxima[(S::kWarps + warp) * kFmaRows + r] = sum;
            }
            float x[8];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                x[c] = o[r][c];
#pragma unroll
                for (int d = kLanesV; d < 32; d *= 2) x[c] += __shfl_xor_sync(kAllLanes, x[c], d);
            }
            if (lane < kLanesV && lane * 8 < HeadDimV) {
                float4* at = reinterpret_cast<float4*>(to + r * S::kPitchO + lane * 8);
                at[0] = make_float4(x[0], x[1], x[2], x[3]);
                at[1] = make_float4(x[4], x[5], x[6], x[7]);
            }
        }
    }
};

// The kernel. As decode(), with a tile in registers for the ring.
template <class Family>
__device__ __forceinline__ bool decode_loaded(const DecodeParams& p) {
    using S = typename Family::S;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32;
    touch_parameters(p, reinterpret_cast<int*>(shared + S::kFlagAt) + 1);
    LoadWalk<S> walk(p, shared);
    const EvenSplit even = walk.prepare();
    PushState* push = reinterpret_cast<PushState*>(shared + S::kPushStateAt);
    if (p.flags & kFlagPush) keep_step(p, push);
    dependency_wait();
    if (p.flags & kFlagPush) ask_push_state(p, push);
    if (p.waiting == 0) dependency_launch();

    Item& item = *reinterpret_cast<Item*>(shared + S::kItemAt);  // the running one, for the whole block
    Item next_item;
    if (even.blocks > 0) {
        if (walk.done) return false;
        const uint32_t small = walk.touch_small(even);
        next_item = walk.start_even(even);
        asm volatile("" ::"r"(small));
        walk.flags |= kSlotFirst | kSlotFinal;
    } else {
        if (p.query_start != nullptr) write_unowned(p, *push);
        next_item = walk.start();
    }
    if (walk.done) return false;

    Family family;
    while (true) {
        const int rows = uniform(min(next_item.tokens * p.group - next_item.row_tile * kFmaRows, kFmaRows));
        Family::stage_query(p, next_item, shared, rows);
        if (threadIdx.x == 0) item = next_item;
        family.begin();
        walk.settle();
        // The tile in registers: none, with no flags, in the first pass.
        PlannedTile tile = {nullptr, nullptr, 0, 0, 0};
        while (true) {
            PlannedTile next = {nullptr, nullptr, 0, 0, 0};
            if (!(tile.flags & kSlotLast)) next = walk.plan();
            if (tile.keys > 0) {
                if (rows == 1) {
                    family.template scores<1>(p, shared);
                } else {
                    family.template scores<2>(p, shared);
                }
            }
            if (next.keys > 0) walk.template load<S::kDimQk>(family.k, next.k, p.k_stride, p.head_dim_qk);
            if (tile.keys > 0) {
                if (rows == 1) {
                    family.template accumulate<1>(p, tile, shared, item.b, walk.fault);
                } else {
                    family.template accumulate<2>(p, tile, shared, item.b, walk.fault);
                }
            }
            if (tile.flags & kSlotPoison) family.poison();
            if (tile.flags & (kSlotLast | kCountOpen)) {
                const bool is_last = tile.flags & kSlotLast;
                if (__builtin_expect(tile.flags >= kCountOpen, 0)) {
                    __syncwarp();
                    family.close_sums(shared + warp * S::kCloseBytes, Family::Long::of_lane(p, Partials<S>::kFloats),
                                      tile.flags >= kCountClosed, is_last);
                    __syncwarp();
                }
                // There is no next one then.
                if (is_last) break;
                next.flags = walk.recount(next.flags);
            }
            if (next.keys > 0) walk.template load<S::kDimV>(family.v, next.v, p.v_stride, p.head_dim_v());
            // The first keys are on their way before the queries have been laid out.
            if (tile.flags == 0) {
                __syncthreads();
                if (warp == 0 && (p.flags & kFlagPush)) {
                    // Once an item: to know that it was done would take a register.
                    await_push_state();
                    __syncwarp();
                    announce(*push);
                }
            }
            tile = next;
        }
        walk.report();
        merge_item<S>(p, item, shared, family, warp * S::kCloseBytes, rows);
        if (tile.flags & kSlotFinal) break;
        __syncthreads();
        walk.next_item(walk.stage);
        next_item = walk.cursor().item;
    }
    return true;
}

}  // namespace treeattn

#define TREEATTN_FMA(QK, V, NAME, BF16_K, BF16_V)                                                                     \
    namespace treeattn {                                                                                              \
    using Fma_d##QK##x##V##_##NAME = Fma<QK, V, BF16_K, BF16_V>;                                                      \
    }                                                                                                                 \
    TREEATTN_DECODE_KERNEL(treeattn_decode_fma_d##QK##x##V##_r2_##NAME, treeattn::Fma_d##QK##x##V##_##NAME,           \
                           treeattn::decode_loaded)
// A k and a v of two types run on tensor cores: hardly anyone has them, and half of these kernels would be theirs.
#define TREEATTN_FMA_ALL(QK, V)                                                                                       \
    TREEATTN_FMA(QK, V, bf16, true, true)                                                                             \
    TREEATTN_FMA(QK, V, f16, false, false)
TREEATTN_FMA_ALL(64, 64)
TREEATTN_FMA_ALL(96, 96)
TREEATTN_FMA_ALL(128, 128)
TREEATTN_FMA_ALL(192, 128)
TREEATTN_FMA_ALL(256, 256)

TREEATTN_ABI(decode_fma)
