// The end of an item whose output a block has made together: its rows are finished, or merged with what other blocks hold.
//
// Partials of 512 columns are many bytes: one block that merged them all would take longer than the keys did. So blocks that
// have nothing else to do wait a little for the others, and whoever sees that all partials of an item have come takes some of its
// strips, in turn, until none is left. The last block to come always sees it, so nothing depends on who waits, and the order
// in which a strip's partials merge does not either.
#pragma once

#include "decode.cuh"

namespace treeattn {

// Of an item, by its first block: partials that have come, shares of strips that are taken, blocks that are done with it. The last
// to be done leaves zeros.
constexpr int kMeetingWords = 4;
// How long a block waits at most for the others.
constexpr uint64_t kMostWaitNs = 50000;

// A row has `used` strips: the number of its place in a partial, of the nth of them all.
template <class S>
__device__ __forceinline__ int strip_of(int nth, int used) {
    return nth / used * Partials<S>::kStripsOfRow + nth % used;
}

// Merges strips [begin, end) of an item's partials and finishes them, `kFanIn` partials a warp.
template <class S>
__device__ __forceinline__ void merge_share(const DecodeParams& p, const Item& item, char* shared, const Split& split,
                                            int begin, int end) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Partials<S> partials{p.workspace.partials};
    const int groups = (split.count + kFanIn - 1) / kFanIn, warps = min(groups, S::kWarps), strips = S::kWarps / warps;
    const int nth = warp / warps;
    float2* const kept = reinterpret_cast<float2*>(shared + S::kQueryAt);  // of each strip and group a strip, then its state
    constexpr int kKept = 33;
    const int used = strips_of_row(p.head_dim_v());
    const auto finish = [&](int strip, RowState state, float2 o) {
        finish_row<S>(p, item, shared, item.row_tile * S::kRows + partials.row_of(strip), partials.column_of(strip), state, o);
    };
#pragma unroll 1
    for (int first = begin; first < end; first += strips) {
        const int strip = strip_of<S>(first + nth, used);
        const bool has_strip = nth < strips && first + nth < end;
#pragma unroll 1
        for (int group = warp % warps; has_strip && group < groups; group += warps) {
            const Slots from = partial_slots(split, group * kFanIn);
            const int n = min(split.count - group * kFanIn, kFanIn);
            float2 x[kFanIn];
#pragma unroll
            for (int k = 0; k < kFanIn; k++) {
                x[k] = k < n ? __ldcg(partials.o(from.at(k), strip)) : make_float2(0.f, 0.f);
            }
            const float2 theirs = lane < n ? __ldcg(partials.state(from.at(lane), strip)) : make_float2(0.f, 0.f);
            float weight;
            uint32_t lives;
            const RowState state = weigh(theirs, weight, lives);
            const float2 o = weighted_sum<kFanIn>(weight, lives, x);
            if (groups == 1) {
                finish(strip, state, o);
            } else {
                float2* const to = kept + (nth * groups + group) * kKept;
                to[lane] = o;
                if (lane == 0) to[32] = make_float2(state.m, state.l);
            }
        }
        if (groups == 1) continue;
        __syncthreads();
        if (has_strip && warp % warps == 0) {
            const float2* const from = kept + nth * groups * kKept;
            float2 x[kFanIn];
#pragma unroll
            for (int k = 0; k < kFanIn; k++) x[k] = k < groups ? from[k * kKept + lane] : make_float2(0.f, 0.f);
            const float2 theirs = lane < groups ? from[lane * kKept + 32] : make_float2(0.f, 0.f);
            float weight;
            uint32_t lives;
            const RowState state = weigh(theirs, weight, lives);
            finish(strip, state, weighted_sum<kFanIn>(weight, lives, x));
        }
        __syncthreads();
    }
}

// After an item's last step, whose output and rows' states lie in shared memory. `is_last`: the block has no other item.
template <class S>
__device__ __forceinline__ void end_wide_item(const DecodeParams& p, const Item& item, char* shared, int rows, bool is_last) {
    const int warp = threadIdx.x / 32;
    const Partials<S> partials{p.workspace.partials};
    const Split split{item.first_block, item.splits, item.split};
    const int64_t slot = partial_slots(split, 0).at(split.index);
    const int used = strips_of_row(p.head_dim_v()), strips = rows * used;
#pragma unroll 1
    for (int nth = warp; nth < strips; nth += S::kWarps) {
        const int strip = strip_of<S>(nth, used);
        const int row = partials.row_of(strip), column = partials.column_of(strip);
        const float* from = reinterpret_cast<const float*>(shared + S::kQueryAt) + row * S::kPitchO + column;
        const float2 o = *reinterpret_cast<const float2*>(from);
        const RowState state = reinterpret_cast<const RowState*>(shared + S::kStateAt)[row];
        if (split.count == 1) {
            finish_row<S>(p, item, shared, item.row_tile * S::kRows + row, column, state, o);
        } else {
            partials.write(slot, strip, state, o);
        }
    }
    if (split.count == 1) return;

    uint32_t* const words = p.workspace.counters + static_cast<int64_t>(split.first_block) * kMeetingWords;
    int* const told = reinterpret_cast<int*>(shared + S::kFlagAt);
    const uint32_t others = split.count - 1;
    constexpr uint32_t kUnending = 0xffffffffu;
    __syncthreads();
    if (threadIdx.x == 0) {
        bool have_come = count_arrival(words, kUnending) == others;
        if (!have_come && is_last) {
            const uint64_t until = nanoseconds() + kMostWaitNs;
            const uint64_t* const seen = reinterpret_cast<const uint64_t*>(words);
            while (!(have_come = static_cast<uint32_t>(load_word(seen)) > others) && nanoseconds() < until) __nanosleep(20);
            __threadfence();
        }
        told[0] = have_come;
    }
    __syncthreads();
    if (told[0]) {
        const int groups = (split.count + kFanIn - 1) / kFanIn, at_once = S::kWarps / min(groups, S::kWarps);
        const int share = (strips + split.count * at_once - 1) / (split.count * at_once) * at_once;
#pragma unroll 1
        while (true) {
            if (threadIdx.x == 0) told[1] = count_arrival(words + 1, kUnending);
            __syncthreads();
            const int begin = told[1] * share;
            if (begin >= strips) break;
            merge_share<S>(p, item, shared, split, begin, min(begin + share, strips));
            __syncthreads();
        }
    }
    if (threadIdx.x == 0 && count_arrival(words + 2, others) == others) words[0] = words[1] = 0;
    __syncthreads();
}

}  // namespace treeattn
