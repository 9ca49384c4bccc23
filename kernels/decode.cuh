// The body of the decode kernels: tiles are attended as they come, and what warps and blocks made of an item
// is merged.
//
// Every warp runs a pipeline of its own (walk.cuh), with no barrier among warps inside an item. At an item's end the
// warps' states meet once in shared memory, in the slots that were just consumed.
#pragma once

#include "long_sums.cuh"
#include "tail.cuh"
#include "walk.cuh"

namespace treeattn {

// Writes an lse; with what it lacks, where it is a partial's.
__device__ __forceinline__ void store_lse(const DecodeParams& p, float* to, float2 lse) {
    to[0] = lse.x;
    if (p.flags & kFlagLseInTwo) to[1] = lse.y;
}

// Writes two finished columns of a row, and its lse; or pushes them.
template <class S>
__device__ __forceinline__ void finish_row(const DecodeParams& p, const Item& item, char* shared, int packed_row,
                                           int column, RowState s, float2 o) {
    const int token_of = item.tokens == 1 ? 0 : packed_row / p.group;
    const int64_t token = item.first_token + token_of;
    const int64_t head = static_cast<int64_t>(item.head) * p.group + packed_row - token_of * p.group;
    float sink = 0.f;
    bool is_sink = false;  // alone
    if constexpr (S::kTerms) {
        // The partial of rank 0 holds the sinks.
        if (p.rank == 0) {
            const auto& block = *reinterpret_cast<const TermsBlock<S::kRows>*>(shared + S::kTermsAt);
            sink = block.rows[packed_row % S::kRows].sink;
            is_sink = s.l == 0.f && sink != -infinity();
            const float weight = add_sink(sink, s.m, s.l);
            o.x *= weight, o.y *= weight;
            // What no key has a part in is zero, also where there was no number.
            if (is_sink) o = make_float2(0.f, 0.f);
        }
    }
    // One float of it takes less time than two.
    const auto one = [&](float lse) {
        if (s.l == 0.f) return -infinity();
        return is_sink && sink == sink && sink < infinity() ? sink : lse;
    };
    const auto two = [&] {
        const float2 lse = natural_lse(s.m, s.l);
        const float high = one(lse.x);
        return make_float2(high, high == lse.x ? lse.y : 0.f);
    };
    if (s.l == 0.f) {
        o = make_float2(0.f, 0.f);
    } else {
        const float inverse = __frcp_rn(s.l);
        o.x *= inverse, o.y *= inverse;
    }
    if (p.flags & kFlagPush) {
        if (column >= p.head_dim_v()) return;
        const PushState& push = *reinterpret_cast<const PushState*>(shared + S::kPushStateAt);
        push_columns(push, static_cast<int>(token), static_cast<int>(head), column, two(), o);
        return;
    }
    const RowTarget& target = p.target;
    char* to = target.row(token, head) + column * target.o_stride[2];
    if (column < p.head_dim_v()) store_two(to, target.o_stride[2], target.dtype, o);
    if (target.lse == nullptr || column != 0) return;
    if (p.flags & kFlagLseInTwo) {
        store_lse(p, target.lse_of(token, head), two());
    } else {
        *target.lse_of(token, head) = one((s.m + log2f(s.l)) * kLn2);
    }
}

// Partials in the workspace: rows of o in whole strips, then (m, l) of each strip.
template <class S>
struct Partials {
    static constexpr int kStripsOfRow = strips_of_row(S::kDimV), kStrips = S::kRows * kStripsOfRow;
    static constexpr int kFloats = kStrips * (kStripColumns + 2);
    float* base;

    __device__ __forceinline__ float2* o(int64_t slot, int strip) const {
        return reinterpret_cast<float2*>(base + slot * kFloats + strip * kStripColumns) + threadIdx.x % 32;
    }
    __device__ __forceinline__ float2* state(int64_t slot, int strip) const {
        return reinterpret_cast<float2*>(base + slot * kFloats + kStrips * kStripColumns) + strip;
    }
    __device__ __forceinline__ void write(int64_t slot, int strip, RowState s, float2 x) const {
        __stcg(o(slot, strip), x);
        if (threadIdx.x % 32 == 0) __stcg(state(slot, strip), make_float2(s.m, s.l));
    }

    static __device__ __forceinline__ int row_of(int strip) { return strip / kStripsOfRow; }
    static __device__ __forceinline__ int column_of(int strip) {
        return strip % kStripsOfRow * kStripColumns + threadIdx.x % 32 * 2;
    }
};

// The end of an item. The warps' states, which lie in shared memory at o_at[warp], become one. That is the result, or the
// block's partial, where other blocks hold the rest of the item: then the last warp of a group to come merges what the
// group left of a strip, in one level or two.
template <class S, class Family>
__device__ __forceinline__ void merge_item(const DecodeParams& p, const Item& item, char* shared, Family& family,
                                           int mine, int rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int* o_at = reinterpret_cast<int*>(shared + S::kFlagAt) + 4;
    const float* maxima = reinterpret_cast<const float*>(shared + S::kStateAt);
    const float* sums = maxima + S::kWarps * S::kRows;
    // What needs no data, before the barrier.
    const Partials<S> partials{p.workspace.partials};
    const Split split{item.first_block, item.splits, item.split};
    const int groups = (split.count + kFanIn - 1) / kFanIn, group = split.index / kFanIn;
    const unsigned others = min(split.count - group * kFanIn, kFanIn) - 1;
    const int64_t slot = partial_slots(split, 0).at(split.index);
    const Slots of_group = partial_slots(split, group * kFanIn);
    // One lane a strip, so that the answers come together.
    static_assert((partials.kStrips + S::kWarps - 1) / S::kWarps <= 32, "strips of a warp");
    const int strip_of_lane = warp + lane * S::kWarps;
    uint32_t* const counter = group_counters(p.workspace, split, group, partials.kStrips) + strip_of_lane;
    if (lane == 0) o_at[warp] = mine;
    family.close(shared, reinterpret_cast<float*>(shared + mine));
    __syncthreads();
#pragma unroll 1
    for (int strip = warp; strip < rows * partials.kStripsOfRow; strip += S::kWarps) {
        const int row = partials.row_of(strip), column = partials.column_of(strip);
        // Columns past the last are nobody's.
        const int at = (row * S::kPitchO + (S::kDimV % kStripColumns == 0 ? column : min(column, S::kDimV - 2))) * 4;
        float2 o = make_float2(0.f, 0.f);
        RowState state{-infinity(), 0.f};
#pragma unroll
        for (int k = 0; k < S::kWarps; k++) state.m = fmaxf(state.m, maxima[k * S::kRows + row]);
#pragma unroll
        for (int k = 0; k < S::kWarps; k++) {
            const float2 x = *reinterpret_cast<const float2*>(shared + o_at[k] + at);
            const float w = power_of_two(maxima[k * S::kRows + row] - state.m);
            state.l = fmaf(sums[k * S::kRows + row], w, state.l);
            o.x = fmaf(x.x, w, o.x), o.y = fmaf(x.y, w, o.y);
        }
        if (split.count == 1) {
            finish_row<S>(p, item, shared, item.row_tile * S::kRows + row, column, state, o);
        } else {
            partials.write(slot, strip, state, o);
        }
    }
    if (split.count == 1) return;

    __syncwarp();
    bool is_last = false;
    if (strip_of_lane < rows * partials.kStripsOfRow) is_last = count_arrival(counter, others) == others;
    uint32_t left = __ballot_sync(kAllLanes, is_last);
#pragma unroll 1
    while (left != 0) {
        const int strip = warp + (__ffs(left) - 1) * S::kWarps;
        left &= left - 1;
        Slots from = of_group;
        int n = others + 1;
        bool whole = groups == 1;
#pragma unroll 1
        while (true) {
            // Values and states are asked for together.
            float2 x[kFanIn];
            const float2* value = partials.o(from.base, strip);
            x[0] = __ldcg(partials.o(from.first, strip));
#pragma unroll
            for (int k = 1; k < kFanIn; k++) {
                value += static_cast<int64_t>(from.step) * (partials.kFloats / 2);
                // Set in any case: what may be unset would hold its registers through the whole kernel.
                x[k] = make_float2(0.f, 0.f);
                if (k < n) x[k] = __ldcg(value);
            }
            const float2 theirs = lane < n ? __ldcg(partials.state(from.at(lane), strip)) : make_float2(0.f, 0.f);
            float weight;
            uint32_t lives;
            const RowState state = weigh(theirs, weight, lives);
            const float2 o = weighted_sum<kFanIn>(weight, lives, x);
            if (whole) {
                const int packed = item.row_tile * S::kRows + partials.row_of(strip);
                finish_row<S>(p, item, shared, packed, partials.column_of(strip), state, o);
                break;
            }
            partials.write(group_slots(split).at(group), strip, state, o);
            __syncwarp();
            uint32_t before = 0;
            if (lane == 0) {
                uint32_t* const of_item = item_counters(p.workspace, split, partials.kStrips);
                before = count_arrival(of_item + strip, groups - 1);
            }
            if (__shfl_sync(kAllLanes, before, 0) != static_cast<uint32_t>(groups - 1)) break;
            from = group_slots(split);
            n = groups;
            whole = true;
        }
    }
}

// Query tokens before the first sequence's and after the last one's: nobody attends for them, their rows are empty.
static __device__ __noinline__ void write_unowned(const DecodeParams& p, const PushState& push) {
    int begin = p.query_start[0], end = 0;
#pragma unroll 1
    for (int b = threadIdx.x % 32; b <= p.batch; b += 32) end = max(end, p.query_start[b]);
    end = min(max(warp_max(end), 0), p.query_tokens), begin = min(max(begin, 0), p.query_tokens);
    const int tokens = begin + p.query_tokens - end;
    const int64_t rows = static_cast<int64_t>(tokens) * p.q_heads;
    if (rows > 0 && (p.flags & kFlagPush)) {
        await_push_state();
        __syncthreads();
    }
#pragma unroll 1
    for (int64_t r = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; r < rows; r += gridDim.x * (blockDim.x / 32)) {
        const int64_t nth = r / p.q_heads, head = r - nth * p.q_heads, token = nth < begin ? nth : nth - begin + end;
        if (p.flags & kFlagPush) {
            for (int c = threadIdx.x % 32 * 2; c < p.head_dim_v(); c += 64) {
                push_columns(push, static_cast<int>(token), static_cast<int>(head), c, make_float2(-infinity(), 0.f),
                             make_float2(0.f, 0.f));
            }
            continue;
        }
        const RowTarget& target = p.target;
        char* to = target.row(token, head);
#pragma unroll 1
        for (int c = threadIdx.x % 32 * 2; c < p.head_dim_v(); c += 64) {
            store_two(to + c * target.o_stride[2], target.o_stride[2], target.dtype, make_float2(0.f, 0.f));
        }
        if (target.lse != nullptr && threadIdx.x % 32 == 0) {
            store_lse(p, target.lse_of(token, head), make_float2(-infinity(), 0.f));
        }
    }
}

// Parameters lie in constant memory, which is cold when a kernel begins: an instruction that takes an operand from it
// stalls on each new line, one line after the other. Fetched like this the lines come together.
template <bool Terms = false>
__device__ __forceinline__ void touch_parameters(const DecodeParams& p, int* unused) {
    constexpr int kLines = (offsetof(DecodeParams, exchange) + 63) / 64, kAll = (sizeof(DecodeParams) + 63) / 64;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&p) + threadIdx.y;  // a zero that the compiler can't see
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kLines; i++) sum ^= words[i * 16];
    if (p.flags & kFlagPush) {
#pragma unroll
        for (int i = kLines; i < kAll; i++) sum ^= words[i * 16];
    }
    if constexpr (Terms) {
#pragma unroll
        for (int i = sizeof(DecodeParams) / 64; i < (sizeof(TermsParams) + 63) / 64; i++) sum ^= words[i * 16];
    }
    if (threadIdx.x == 0) *unused = static_cast<int>(sum);
}

// Fills a slot as Walk's fill_even or fill does, with the copies in line once.
template <class S>
__device__ __forceinline__ void fill_either(Walk<S>& walk, int stage, bool is_even) {
    const int base = walk.tile * kTile;
    const bool there = !walk.done && walk.tile < walk.tile_end;
    const int live = there ? min(max(walk.keys - base, 0), kTile) : 0;
    const bool bad = there && walk.copy_next(stage, base, live);
    if (is_even) {
        if (there) walk.end_even(stage, bad);
        copy_async_commit();
    } else if (walk.done) {
        walk.end_slots(stage);
    } else {
        walk.end_fill(stage, base, live, bad);
    }
}

// The kernel. A family holds one warp's state (running maximum, sum and output of its rows) and says how a tile is
// attended: stage_query, begin, attend, poison, close_sums, close. Says whether the block had keys, and so has announced its rank.
template <class Family>
__device__ __forceinline__ bool decode(const DecodeParams& p) {
    using S = typename Family::S;
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t slots = shared_address(shared) + warp * S::kStages * S::kSlotBytes;
    touch_parameters<S::kTerms>(p, reinterpret_cast<int*>(shared + S::kFlagAt) + 1);
    if constexpr (!S::kRaw) {
        for (int i = 0; i < S::kStages; i++) clear_padding<S>(p, slots + i * S::kSlotBytes, lane);
    }
    __syncwarp();
    Walk<S> walk(p, shared);
    const EvenSplit even = walk.prepare();
    const bool is_even = even.blocks > 0;
    PushState* push = reinterpret_cast<PushState*>(shared + S::kPushStateAt);
    if (p.flags & kFlagPush) keep_step(p, push);
    dependency_wait();
    if (p.flags & kFlagPush) ask_push_state(p, push);
    if (p.waiting == 0) dependency_launch();

    Family family;
    Tile tile = {};
    Item& item = *reinterpret_cast<Item*>(shared + S::kItemAt);  // the running one, for the whole block
    int rows = 0;
    const auto take_item = [&](const Item& next) {
        rows = min(next.tokens * p.group - next.row_tile * S::kRows, S::kRows);
        family.stage_query(p, next, shared, rows);
        if (threadIdx.x == 0) item = next;
    };
    int stage = 0, filled = 0;
    Item first;
    if (is_even) {
        if (walk.done) return false;
        const uint32_t small = walk.touch_small(even);
        first = walk.start_even(even);
        asm volatile("" ::"r"(small));
    } else {
        if (p.query_start != nullptr) write_unowned(p, *push);
        first = walk.start();
    }
    if (walk.done) return false;

    // The ring is full before the first tile is attended; from then on a slot is filled again as soon as it is free.
    int next_tile = even.index * S::kWarps + warp;  // of an evenly split item, the next to be attended
    if constexpr (S::kTerms) next_tile = walk.tile;
    while (true) {
        if constexpr (S::kInBlocks) {
            fill_either(walk, stage, is_even);
        } else if (is_even) {
            walk.fill_even(stage);
        } else {
            walk.fill(stage);
        }
        if (++stage == S::kStages) stage = 0;
        if (++filled < S::kStages) {
            // The first keys are on their way before the queries are laid out.
            if (filled == 1) take_item(first);
            continue;
        }
        const int4* from = reinterpret_cast<const int4*>(shared + S::kInfoAt) + (warp * S::kStages + stage) * 3;
        if (is_even) {
            tile.base = next_tile * kTile;
            tile.keys = min(max(walk.keys - tile.base, 0), kTile);
            if constexpr (S::kTerms) {
                // There may be keys that nobody sees after the last tile.
                if (next_tile >= walk.tile_end) tile.keys = 0;
            }
            tile.flags = walk.flags | (filled == S::kStages ? kSlotFirst : 0);
            next_tile += walk.step;
            if (next_tile >= walk.tile_end) tile.flags |= kSlotLast | kSlotFinal;
            if (p.kv_layout != kStrided && tile.keys > 0 && (from->x & kSlotPoison)) {
                if (lane == 0) walk.report_pages(tile.base);
                tile.flags |= kSlotPoison;
                tile.keys = 0;
            }
        } else {
            tile = *reinterpret_cast<const Tile*>(from);
            if (tile.flags & kSlotEnd) break;
            if ((tile.flags & kSlotFirst) && filled > S::kStages) {
                const Item next = *reinterpret_cast<const Item*>(from + 1);
                take_item(next);
                filled = S::kStages + 1;  // counts tiles of the item from here on
            }
        }
        if (tile.flags & kSlotFirst) {
            __syncthreads();
            family.begin(p, shared);
        }
        const uint32_t slot = slots + stage * S::kSlotBytes;
        copy_async_wait<S::kStages - 1>();
        __syncwarp();
        if (filled == S::kStages && warp == 0 && (p.flags & kFlagPush)) announce(*push);
        if constexpr (S::kTerms) {
            if (tile.keys > 0) family.attend(p, tile, shared, slot, walk.stage_memory(stage));
        } else {
            if (tile.keys > 0) family.attend(p, tile, shared, slot);
        }
        if (tile.flags & kSlotPoison) family.poison();
        if ((tile.flags | filled) & kSlotLast) {
            // The slot is consumed and not yet filled again.
            const int mine = (warp * S::kStages + stage) * S::kSlotBytes;
            const bool is_last = tile.flags & kSlotLast;
            if (__builtin_expect(filled >= kOpenTiles, 0)) {
                __syncwarp();
                family.close_sums(shared + mine, Family::Long::of_lane(p, Partials<S>::kFloats), filled >= kClosed, is_last);
                __syncwarp();
                filled = kClosed + S::kStages;
            }
            if (is_last) {
                merge_item<S>(p, item, shared, family, mine, rows);
                if (tile.flags & kSlotFinal) break;
                __syncthreads();
            }
            if constexpr (!S::kRaw) clear_padding<S>(p, slot, lane);
        }
        __syncwarp();
    }
    copy_async_wait<0>();
    return true;
}

// A kernel and its constant, by the naming rule of params.cuh. BODY<FAMILY> is what it does.
#define TREEATTN_DECODE_KERNEL(NAME, FAMILY, BODY)                                                                    \
    extern "C" __device__ const treeattn::KernelLaunch NAME##_launch = {                                                \
        FAMILY::S::kThreads, FAMILY::S::kSharedBytes, FAMILY::S::kBlocks, treeattn::Partials<FAMILY::S>::kFloats * 4, \
        treeattn::Partials<FAMILY::S>::kStrips * treeattn::kCountersOfStrip, FAMILY::S::kRows,                        \
        treeattn::open_tiles(FAMILY::S::kWarps), FAMILY::Long::kBlockBytes};                                          \
    extern "C" __global__ void __launch_bounds__(FAMILY::S::kThreads, FAMILY::S::kBlocks)                           \
        NAME(const __grid_constant__ treeattn::DecodeParams params) {                                                 \
        treeattn::end_step<FAMILY::S>(params, BODY<FAMILY>(params));                                                  \
    }
// The same of a family that takes TermsParams.
#define TREEATTN_TERMS_KERNEL(NAME, FAMILY)                                                                           \
    extern "C" __device__ const treeattn::KernelLaunch NAME##_launch = {                                                \
        FAMILY::S::kThreads, FAMILY::S::kSharedBytes, FAMILY::S::kBlocks, treeattn::Partials<FAMILY::S>::kFloats * 4, \
        treeattn::Partials<FAMILY::S>::kStrips * treeattn::kCountersOfStrip, FAMILY::S::kRows,                        \
        treeattn::open_tiles(FAMILY::S::kWarps), FAMILY::Long::kBlockBytes};                                          \
    extern "C" __global__ void __launch_bounds__(FAMILY::S::kThreads, FAMILY::S::kBlocks)                           \
        NAME(const __grid_constant__ treeattn::TermsParams params) {                                                  \
        treeattn::end_step<FAMILY::S>(params.step, treeattn::decode<FAMILY>(params.step));                            \
    }

}  // namespace treeattn
