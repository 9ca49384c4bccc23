// The exchange of partials between ranks: which rows a rank merges, and which of its blocks do.
#pragma once

#include "merge_ranks.cuh"

namespace treeattn {

// How long a block that may not wait stays for the headers of ranks that are late, ns. It holds its place on the GPU
// meanwhile, which another communicator's kernel may need.
constexpr uint64_t kBriefly = 10'000;
constexpr uint32_t kBetweenLooks = 20;  // ns
static_assert(kMaxShares == kLeftOverWords * 64, "each block that has rows of its own has a bit");

// Which rows of a launch are a rank's: those of `own` heads from `first` on. Rows are numbered from the launch's first.
struct Rows {
    int64_t begin, before;
    int heads, first, own;
    int64_t count;

    __device__ __forceinline__ Rows(const MergeStep& m, int first_head, int own_heads)
        : begin(m.first_row), heads(m.view.heads), first(first_head), own(own_heads) {
        before = owned_until(begin);
        count = owned_until(begin + m.rows) - before;
    }
    // Owned rows before flat row x.
    __device__ __forceinline__ int64_t owned_until(int64_t x) const {
        const int64_t token = x / heads;
        const int head = static_cast<int>(x - token * heads);
        return token * own + min(max(head - first, 0), own);
    }
    // The n-th owned row of the launch.
    __device__ __forceinline__ int64_t at(int64_t n) const {
        const int64_t nth = before + n, token = nth / own;
        return token * heads + first + (nth - token * own) - begin;
    }
};

// The n-th row of this rank's.
__device__ __forceinline__ int64_t row_of(const MergeStep& m, int64_t n) {
    return m.view.own_heads == m.view.heads ? n : Rows(m, m.view.first_head, m.view.own_heads).at(n);
}
// How many there are.
__device__ __forceinline__ int64_t count_rows(const MergeStep& m) {
    return m.view.own_heads == m.view.heads ? m.rows : Rows(m, m.view.first_head, m.view.own_heads).count;
}

// In two shots only blocks that may wait have a part: a rank's merged rows may come from a launch that is not there yet.
static __device__ __noinline__ void receive_two_shot(const MergeStep* m, Epoch& e, int nth, int waiting) {
    const ExchangeView& v = m->view;
    const int warps = blockDim.x / 32;
    const int64_t begin = static_cast<int64_t>(nth) * warps + threadIdx.x / 32, step = static_cast<int64_t>(waiting) * warps;
    if (!e.broken) wait_headers(v, e, 0);
    const int first = first_head_of(v.rank, v.heads, v.world);
    const Rows own(*m, first, first_head_of(v.rank + 1, v.heads, v.world) - first);
    for (int64_t n = begin; n < own.count && !e.broken; n += step) merge_large_row(m, e, own.at(n), true);
    const Rows mine(*m, v.first_head, v.own_heads);
    for (int64_t n = begin; n < mine.count; n += step) {
        const int64_t row = mine.at(n);
        if (e.broken || !write_received(m, e, row)) poison_row(m, row);
    }
}

// Bad data of the step, which all of a block's warps have read: tells the host, and clears the word with the step's last
// exchange. One thread of each block.
static __device__ __noinline__ void end_step_fault(const ExchangeView& v, int parity, uint32_t fault, bool is_last) {
    if (blockIdx.x == 0) report_bad_data(v, parity, fault);
    if (!is_last) return;
    // The last block to come clears what all of them have read.
    const uint32_t others = gridDim.x - 1;
    if (count_arrival(reinterpret_cast<uint32_t*>(v.window + kArrived), others) == others) {
        store_word(v.window + kStepFault, 0);
    }
}

// The n-th block from the end, which may not wait, decides whether it merges its share of rows: where every rank's header has
// come, or comes soon. By the whole block.
__device__ __forceinline__ bool decide(MergeStep* m, Epoch& e, int nth, int warp) {
    const ExchangeView& v = m->view;
    const int parity = e.parity();
    if (warp == 0) {
        const bool comes = e.broken || wait_headers(v, e, kBriefly);
        if (threadIdx.x == 0) {
            m->ticket = comes;
            if (!comes) leave_over(v.window + kLeftOver + parity * kLeftOverWords + nth / 64, 1ull << nth % 64);
            add_word(v.window + kDecided + parity, comes ? 1 : 1 | 1ull << 32);
        }
    }
    __syncthreads();
    return m->ticket != 0;
}

__device__ __forceinline__ uint64_t decided_of(const ExchangeView& v, int parity) {
    return load_word(v.window + kDecided + parity);
}

// One of the blocks that may wait, `waiting` of them, takes its part of what others have left over of `own` shares: waits until
// all have decided, and calls `merge(share)`. `decided`: what thread 0 last saw of kDecided. By the whole block.
template <class Merge>
__device__ __forceinline__ void take_left_over(MergeStep* m, int parity, uint64_t decided, int nth, int waiting, int own,
                                               const Merge& merge) {
    const ExchangeView& v = m->view;
    if (threadIdx.x == 0) {
        // No longer than this rank attends.
        while (static_cast<uint32_t>(decided) != static_cast<uint32_t>(own - waiting)) {
            __nanosleep(kBetweenLooks);
            decided = decided_of(v, parity);
        }
        m->ticket = decided >> 32 != 0;
        if (decided >> 32 != 0) __threadfence();
    }
    __syncthreads();
    if (m->ticket == 0) return;
    for (int share = waiting + nth; share < own; share += waiting) {
        const uint64_t left = load_word(v.window + kLeftOver + parity * kLeftOverWords + share / 64);
        if (left >> share % 64 & 1) merge(share);
    }
}

// What comes after a block's pushes: waits for all ranks, merges this rank's rows, whose o has at most kMostWords words, and
// writes them, NaN where the communicator is broken. By whole blocks.
//
// A block takes as many rows at a time as it has warps, and the n-th block from the end has the n-th such share. The last
// blocks of the grid, `waiting` of them, wait for whatever it takes; so there is always room for what they wait for, as long
// as those that wait, of all kernels on the GPU, leave room for one more block. Any other block takes its share only where
// every rank's header has come: then the launches that push what it waits for run, or have run, and need no room any more.
// Else it leaves the share over, and says so before it counts as decided; blocks that may wait share what was left over once
// all have decided. Rows beyond one share a block are drawn from a counter by who is there, in the end by those that may
// wait.
template <int kMostWords>
__device__ __forceinline__ void receive(MergeStep* m, Epoch& e) {
    const ExchangeView& v = m->view;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, blocks = static_cast<int>(gridDim.x);
    const int waiting = min(m->waiting, blocks), nth = blocks - 1 - static_cast<int>(blockIdx.x);
    const bool may_wait = nth < waiting;
    const int parity = e.parity();
    delay(DelayPoint::kWait, e.number);
    if (v.mode == kTwoShot) {
        if (may_wait) receive_two_shot(m, e, nth, waiting);
        return;
    }
    const int64_t shares = (m->count + warps - 1) / warps;
    const int own = static_cast<int>(min(shares, static_cast<int64_t>(min(blocks, kMaxShares))));
    bool takes = nth < own;
    // This block's part in letting the next launch come up; those that may wait see to it when that does no harm.
    if (!may_wait) {
        dependency_launch();
        if (!takes) return;
        takes = decide(m, e, nth, warp);
        e.has_headers = true;
        if (!takes) return;
    }
    const auto merge = [&](int64_t share) {
        const int64_t n = share * warps + warp;
        if (n >= m->count) return;
        const int64_t row = row_of(*m, n);
        if (e.broken || !write_merged<kMostWords>(m, e, row)) poison_row(m, row);
    };
    const bool may_be_left = may_wait && own > waiting;
    // Asked for before the own rows come: most blocks have decided by then.
    uint64_t decided = 0;
    if (may_be_left && threadIdx.x == 0) decided = decided_of(v, parity);
    if (takes) merge(nth);
    if (may_be_left) take_left_over(m, parity, decided, nth, waiting, own, merge);
    if (shares > own) {
        while (true) {
            // All have read what was there.
            __syncthreads();
            if (threadIdx.x == 0) {
                auto* drawn = reinterpret_cast<unsigned long long*>(v.window + kTickets + parity);
                m->ticket = own + static_cast<int>(atomicAdd(drawn, 1ull));
            }
            __syncthreads();
            if (m->ticket >= shares) break;
            merge(m->ticket);
        }
    }
    // Epochs rest on it that no rank ends one before all have come.
    if (nth == 0 && warp == 0 && !e.has_headers && !e.broken) wait_headers(v, e, 0);
    delay(DelayPoint::kConsume, e.number);
}

}  // namespace treeattn
