// The body of the kernels for wide heads: warps that walk, and warps that attend step after step and merge at an item's end.
#pragma once

#include "decode_wide.cuh"
#include "wide_merge.cuh"

namespace treeattn {

// The warps that walk: each copies its walker's tiles, as far ahead as there are stages. They meet those that attend wherever a
// stage changes hands, as often as there are steps.
template <class S>
__device__ __forceinline__ bool walk_wide(Walk<S>& walk, const EvenSplit& even) {
    const DecodeParams& p = walk.p;
    if (even.blocks > 0) {
        const Item first = walk.start_even(even);
        walk.flags |= kSlotFirst | kSlotFinal;
        if (walk.lane == 0) walk.cursor().item = first;
        __syncwarp();
    } else {
        walk.start();
    }
    const bool has_keys = !walk.done;
    int steps = 0, stage = 0;  // to come; to be filled
    const auto fill = [&] {
        steps += !walk.done;
        walk.fill(stage);
        if (++stage == S::kStages) stage = 0;
    };
    fill();
    __syncthreads();
    if (!has_keys) return false;
#pragma unroll 1
    for (int i = 1; i < S::kStages; i++) fill();
    copy_async_wait<S::kStages - 1>();
    __syncthreads();
    int past = 0;  // steps, up to 2
#pragma unroll 1
    for (; steps > 0; steps--) {
        if constexpr (S::kIsAhead) {
            // The tile after this one has to be there. Once all meet, nobody needs the one before the last.
            if (past == 0) {
                copy_async_wait<S::kStages - 2>();
            } else if (past == 1) {
                copy_async_wait<S::kStages - 3>();
            } else {
                copy_async_wait<S::kStages - 4>();
            }
            __syncthreads_or(false);
            if (past < 2) {
                past++;
            } else {
                fill();
            }
        } else {
            __syncthreads_or(false);
            __syncthreads();
            fill();
            copy_async_wait<S::kStages - 1>();
            __syncthreads();
        }
    }
    copy_async_wait<0>();
    return true;
}

// The warps that attend. Says whether the block had keys, and so has announced its rank.
template <class Family>
__device__ __forceinline__ bool attend_wide(const DecodeParams& p, char* shared, PushState* push) {
    using S = typename Family::S;
    const int warp = threadIdx.x / 32;
    const auto notes = [&](int stage) { return reinterpret_cast<const SlotInfo*>(shared + S::kInfoAt) + stage; };
    Family family;
    Item& item = *reinterpret_cast<Item*>(shared + S::kItemAt);  // the running one
    int rows = 0;
    const auto take_item = [&](int stage) {
        const Item next = notes(stage)->item;
        rows = min(next.tokens * p.group - next.row_tile * S::kRows, S::kRows);
        family.stage_query(p, next, shared, rows);
        if (threadIdx.x == 0) item = next;
    };
    Tile tile;
    const auto begin_tile = [&](int stage, int turn) {
        tile = notes(stage)->tile;
        family.ask(p, tile, shared);
        family.multiply_keys(p, shared, stage, turn);
    };
    __syncthreads();
    if (notes(0)->tile.flags & kSlotEnd) return false;
    take_item(0);
    if ((p.flags & kFlagPush) && warp == 0) await_push_state();
    // The first tile has come.
    __syncthreads();
    if ((p.flags & kFlagPush) && warp == 0) announce(*push);

    int stage = 0, turn = 0, open = 0;  // of the tile that is weighed; tiles since sums were closed
    bool is_new = true, has_closed = false, is_special = false;
    Tile last;  // of the item, whose values are still to be added
#pragma unroll 1
    while (true) {
        if (is_new) {
            last.keys = 0;
            family.begin(shared);
            begin_tile(stage, turn);
            is_new = false;
        }
        const int next = stage + 1 == S::kStages ? 0 : stage + 1, before = (stage == 0 ? S::kStages : stage) - 1;
        const Tile now = tile;
        const bool is_last = now.flags & kSlotLast;
        const bool drains = ++open == kOpenTiles || is_last;
        if constexpr (S::kIsAhead) {
            // The next tile has come.
            const bool was_special = __syncthreads_or(is_special);
            is_special = now.keys > 0 && family.weigh(p, now, shared, turn);
            if (!is_last) begin_tile(next, turn ^ 1);
            if (last.keys > 0) family.accumulate(p, last, shared, before, turn ^ 1, was_special);
            last = now;
            if (drains) {
                meet<S::kAttending>();
                if (now.keys > 0) family.accumulate(p, now, shared, stage, turn, true);
                last.keys = 0, is_special = false;
            }
        } else {
            meet<S::kAttending>();
            is_special = __syncthreads_or(now.keys > 0 && family.weigh(p, now, shared, turn));
            if (now.keys > 0) family.accumulate(p, now, shared, stage, turn, is_special);
        }
        if (now.flags & kSlotPoison) family.poison();
        if (drains) {
            family.leave_state(shared);
            meet<S::kAttending>();
            if (open == kOpenTiles || has_closed) {
                // No warp needs the stage any more.
                family.close_sums(shared, stage, Family::Long::of_lane(p, Partials<S>::kFloats), has_closed, is_last);
                if (is_last) family.leave_state(shared);
                meet<S::kAttending>();
                clear_wide_padding<S>(p, shared_address(shared) + stage * S::kSlotBytes);
                has_closed = !is_last;
                meet<S::kAttending>();
            }
            open = 0;
        }
        if constexpr (!S::kIsAhead) {
            __syncthreads();
            __syncthreads();
        }
        if (is_last) {
            family.close(shared);
            meet<S::kAttending>();
            const bool is_final = now.flags & kSlotFinal;
            end_wide_item<S>(p, item, shared, rows, is_final);
            if (is_final) return true;
            meet<S::kAttending>();
            take_item(next);
            meet<S::kAttending>();
            is_new = true;
        } else if constexpr (!S::kIsAhead) {
            begin_tile(next, turn ^ 1);
        }
        stage = next, turn ^= 1;
    }
}

// Says whether the block had keys, and so has announced its rank.
template <class Family>
__device__ __forceinline__ bool decode_wide(const DecodeParams& p) {
    using S = typename Family::S;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32;
    touch_parameters<true>(p, reinterpret_cast<int*>(shared + S::kFlagAt) + 4);
    if (warp < S::kWarps) {
        for (int i = 0; i < S::kStages; i++) clear_wide_padding<S>(p, shared_address(shared) + i * S::kSlotBytes);
    }
    __syncthreads();
    Walk<S> walk(p, shared);
    const EvenSplit even = walk.prepare();
    PushState* push = reinterpret_cast<PushState*>(shared + S::kPushStateAt);
    if (p.flags & kFlagPush) keep_step(p, push);
    dependency_wait();
    if (p.flags & kFlagPush) ask_push_state(p, push);
    if (p.waiting == 0) dependency_launch();
    if (even.blocks > 0) {
        if (walk.done) return false;
    } else if (p.query_start != nullptr) {
        write_unowned(p, *push);
    }
    if (warp >= S::kWarps) return walk_wide(walk, even);
    if (even.blocks > 0) {
        const uint32_t small = walk.touch_small(even, warp);
        asm volatile("" ::"r"(small));
    } else if (p.batch > 32) {
        // All threads take part.
        find_slice<S::kRows, true>(p, reinterpret_cast<SliceScratch*>(shared + S::kScratchAt));
    }
    return attend_wide<Family>(p, shared, push);
}

// A kernel and its constant, by the naming rule of params.cuh.
#define TREEATTN_WIDE_KERNEL(NAME, FAMILY)                                                                            \
    extern "C" __device__ const treeattn::KernelLaunch NAME##_launch = {                                                \
        FAMILY::S::kThreads, FAMILY::S::kSharedBytes, FAMILY::S::kBlocks, treeattn::Partials<FAMILY::S>::kFloats * 4, \
        treeattn::kMeetingWords, FAMILY::S::kRows, treeattn::open_tiles(1),                  \
        FAMILY::Long::kBlockBytes};                                                                                   \
    extern "C" __global__ void __launch_bounds__(FAMILY::S::kThreads, FAMILY::S::kBlocks)                           \
        NAME(const __grid_constant__ treeattn::TermsParams params) {                                                  \
        treeattn::end_step<FAMILY::S>(params.step, treeattn::decode_wide<FAMILY>(params.step));                       \
    }

}  // namespace treeattn
