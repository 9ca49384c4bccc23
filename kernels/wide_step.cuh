// The body of the kernels for wide heads: a block's steps, one after the other, each warp's walk, and what comes at an item's end.
#pragma once

#include "decode_wide.cuh"
#include "wide_merge.cuh"

namespace treeattn {

// Steps after which sums are closed.
constexpr int kOpenSteps = 1024;

// Says whether the block had keys, and so has announced its rank.
template <class Family>
__device__ __forceinline__ bool decode_wide(const DecodeParams& p) {
    using S = typename Family::S;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, walker = warp / S::kWarpsAWalker;
    const uint32_t slots = shared_address(shared) + walker * S::kStages * S::kSlotBytes;
    touch_parameters<true>(p, reinterpret_cast<int*>(shared + S::kFlagAt) + 4);
    for (int i = 0; i < S::kStages; i++) clear_wide_padding<S>(p, slots + i * S::kSlotBytes);
    __syncthreads();
    Walk<S> walk(p, shared);
    const EvenSplit even = walk.prepare();
    const bool is_even = even.blocks > 0;
    PushState* push = reinterpret_cast<PushState*>(shared + S::kPushStateAt);
    if (p.flags & kFlagPush) keep_step(p, push);
    dependency_wait();
    if (p.flags & kFlagPush) ask_push_state(p, push);
    if (p.waiting == 0) dependency_launch();

    Item& item = *reinterpret_cast<Item*>(shared + S::kItemAt);  // the running one
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

    Family family;
    int rows = 0;
    const auto take_item = [&](const Item& next) {
        rows = min(next.tokens * p.group - next.row_tile * S::kRows, S::kRows);
        family.stage_query(p, next, shared, rows);
        if (threadIdx.x == 0) item = next;
    };
    int next_tile = walk.tile - walker;  // of an evenly split item, the first of the next step
    // What all threads know of the step in a stage of the ring, whose notes are written.
    const auto step_in = [&](int stage) {
        Tile step;
        const int4* notes = reinterpret_cast<const int4*>(shared + S::kInfoAt) + stage * 3;
        int bad = 0;
        if (is_even) {
            step.base = next_tile * kTile, step.b = 0;
            step.keys = max(min(walk.keys - step.base, min(walk.tile_end - next_tile, S::kWalkers) * kTile), 0);
            next_tile += walk.step;
            step.flags = walk.flags & kSlotPoison;
            if (next_tile >= walk.tile_end) step.flags |= kSlotLast | kSlotFinal;
        } else {
            step = *reinterpret_cast<const Tile*>(notes);
        }
#pragma unroll
        for (int g = 0; g < S::kWalkers; g++) {
            const int4 of_tile = notes[g * S::kStages * 3];
            const bool counts = is_even ? p.kv_layout != kStrided && step.keys > g * kTile : true;
            if (counts) bad |= of_tile.x & kSlotPoison;
            if (!is_even && g > 0) step.keys += of_tile.z;
        }
        if (bad && is_even) {
            if (threadIdx.x == 0) walk.report_pages(step.base);
        }
        if (bad) step.flags |= kSlotPoison, step.keys = 0;
        return step;
    };

#pragma unroll 1
    for (int i = 0; i < S::kStages; i++) {
        fill_either(walk, i, is_even);
        // The first keys are on their way before the queries are laid out.
        if (i == 0) take_item(first);
    }
    Tile step;
    const auto begin_step = [&](int stage) {
        step = step_in(stage);
        family.ask(p, step, shared);
        family.multiply_keys(p, shared, stage);
    };
    int stage = 0, steps = 0;
    bool is_new = true, is_first = true, has_closed = false;
#pragma unroll 1
    while (true) {
        if (is_new) {
            // The item's first tile has come, also for the others, and so have its queries.
            if (is_first) copy_async_wait<S::kStages - 1>();
            __syncthreads();
            if (is_first && warp == 0 && (p.flags & kFlagPush)) announce(*push);
            family.begin(shared);
            begin_step(stage);
        }
        const int next = stage + 1 == S::kStages ? 0 : stage + 1;
        __syncthreads();
        if constexpr (S::kIsAhead) {
            // The stage before this one is free.
            if (!is_first) fill_either(walk, (stage == 0 ? S::kStages : stage) - 1, is_even);
        }
        is_new = is_first = false;
        bool is_special = step.keys > 0 && family.weigh(p, step, shared);
        if (step.flags & kSlotPoison) family.poison();
        if constexpr (S::kIsAhead) copy_async_wait<S::kStages - 2>();
        is_special = __syncthreads_or(is_special);
        const Tile current = step;
        const bool is_last = current.flags & kSlotLast;
        if (S::kIsAhead && !is_last) begin_step(next);
        if (current.keys > 0) family.accumulate(p, current, shared, stage, is_special);
        const bool closes = ++steps == kOpenSteps || (is_last && has_closed);
        if (closes || is_last) family.leave_state(shared);
        if (closes || is_last || !S::kIsAhead) __syncthreads();
        if (closes) {
            // No warp needs the stage any more.
            family.close_sums(shared, stage, Family::Long::of_lane(p, Partials<S>::kFloats), has_closed, is_last);
            if (is_last) family.leave_state(shared);
            __syncthreads();
            clear_wide_padding<S>(p, slots + stage * S::kSlotBytes);
            steps = 0, has_closed = !is_last;
            __syncthreads();
        }
        if constexpr (!S::kIsAhead) {
            fill_either(walk, stage, is_even);
            copy_async_wait<S::kStages - 1>();
        }
        if (is_last) {
            family.close(shared);
            __syncthreads();
            const bool is_final = current.flags & kSlotFinal;
            end_wide_item<S>(p, item, shared, rows, is_final);
            if (is_final) break;
            __syncthreads();
            take_item(*reinterpret_cast<const Item*>(shared + S::kInfoAt + next * sizeof(SlotInfo) + sizeof(Tile)));
            is_new = true;
            steps = 0;
        } else if constexpr (!S::kIsAhead) {
            __syncthreads();
            begin_step(next);
        }
        stage = next;
    }
    copy_async_wait<0>();
    return true;
}

// A kernel and its constant, by the naming rule of params.cuh.
#define TREEATTN_WIDE_KERNEL(NAME, FAMILY)                                                                            \
    extern "C" __device__ const treeattn::KernelLaunch NAME##_launch = {                                                \
        FAMILY::S::kThreads, FAMILY::S::kSharedBytes, FAMILY::S::kBlocks, treeattn::Partials<FAMILY::S>::kFloats * 4, \
        treeattn::kMeetingWords, FAMILY::S::kRows, (treeattn::kOpenSteps - 8) * FAMILY::S::kWalkers,                  \
        FAMILY::Long::kBlockBytes};                                                                                   \
    extern "C" __global__ void __launch_bounds__(FAMILY::S::kThreads, FAMILY::S::kBlocks)                           \
        NAME(const __grid_constant__ treeattn::TermsParams params) {                                                  \
        treeattn::end_step<FAMILY::S>(params.step, treeattn::decode_wide<FAMILY>(params.step));                       \
    }

}  // namespace treeattn
