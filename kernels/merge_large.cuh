// How one warp merges a row of any number of ranks and any size, and how rows go in two shots.
#pragma once

#include "merge_step.cuh"

namespace treeattn {

constexpr int kRanksTogether = 4;  // whose words are asked for before the first is looked at: they come at the same time

// The log-sum-exps of a row and what follows from them, of any number of ranks; lane r has those of ranks r and r + 32.
struct Weights {
    float2 lse[2];
    float weight[2];  // as shares
    RowScale scale;
    uint32_t fault;  // bad data that came with the row, that of the first sequence
};

// One warp waits for the log-sum-exps of all ranks' partials of the row at word `at` of their slots.
__device__ __forceinline__ bool wait_weights(const ExchangeView& v, Epoch& e, int64_t at, Weights& w) {
    const int lane = threadIdx.x % 32;
    w.fault = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        w.lse[half] = make_float2(-infinity(), 0.f);
        const int rank = half * 32 + lane;
        if (half * 32 >= v.world) continue;
        bool seen = rank >= v.world;
        for (int spins = 1;; spins++) {
            if (!seen) {
                const ulonglong2 words = load_words(slot_of(v, e, rank) + at);
                seen = are_of(words, e.number);
                if (seen) {
                    w.lse[half] = lse_of(data_of(words.x), data_of(words.y));
                    w.fault = first_fault(w.fault, fault_of(w.lse[half], data_of(words.y)));
                }
            }
            if (__all_sync(kAllLanes, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, lowest(seen, rank))) return false;
        }
    }
    w.scale.bad = __any_sync(kAllLanes, !(w.lse[0].x < infinity()) || !(w.lse[1].x < infinity()));
    w.scale.top = w.lse[1].x > w.lse[0].x ? w.lse[1] : w.lse[0];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        // Of equal ones the larger rest, so that lanes agree.
        const float2 other = make_float2(__shfl_xor_sync(kAllLanes, w.scale.top.x, d),
                                         __shfl_xor_sync(kAllLanes, w.scale.top.y, d));
        const bool is_larger = other.x > w.scale.top.x || (other.x == w.scale.top.x && other.y > w.scale.top.y);
        if (is_larger) w.scale.top = other;
        w.fault = first_fault(w.fault, __shfl_xor_sync(kAllLanes, w.fault, d));
    }
    w.scale.sum = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        w.weight[half] = w.scale.weight(w.lse[half]);
        if (half * 32 >= v.world) continue;
        for (int rank = 0; rank < min(v.world - half * 32, 32); rank++) {
            w.scale.sum.add(__shfl_sync(kAllLanes, w.weight[half], rank));
        }
    }
    w.scale.invert();
    w.weight[0] = w.scale.share(w.weight[0]), w.weight[1] = w.scale.share(w.weight[1]);
    return true;
}

// One warp merges a row of any size: waits for every rank's words and gives the merged ones, two at a time, to
// `take(word of o, its elements, those of the next word)`, then what follows from the log-sum-exps to `end`. The headers have come. False: the
// communicator is broken.
template <class Take, class End>
__device__ __forceinline__ bool merge_row(const MergeStep& m, Epoch& e, int64_t row, Take take, End end) {
    const ExchangeView& v = m.view;
    const Wire wire(v.wire_dtype);
    const int lane = threadIdx.x % 32;
    const int words = static_cast<int>(row_words(m.target.dim, v.wire_dtype)) - kRowHead;
    const int64_t at = kHeaderWords + row * (words + kRowHead);
    Weights w;
    if (!wait_weights(v, e, at, w)) return false;
#pragma unroll 1
    for (int first = 0; first < words; first += kWordsAPass) {
        float2 acc[kPairs][2] = {};
#pragma unroll 1
        for (int ranks = 0; ranks < v.world; ranks += kRanksTogether) {
            ulonglong2 x[kRanksTogether][kPairs];
            const uint64_t* const from = slot_of(v, e, ranks) + at + kRowHead + first + lane * 2;
            for (int spins = 1;; spins++) {
                int late = v.world;
#pragma unroll
                for (int r = 0; r < kRanksTogether; r++) {
#pragma unroll
                    for (int pair = 0; pair < kPairs; pair++) {
                        if (ranks + r >= v.world || first + pair * 64 + lane * 2 >= words) continue;
                        x[r][pair] = load_words(from + r * v.slot_words + pair * 64);
                    }
                }
#pragma unroll
                for (int r = kRanksTogether - 1; r >= 0; r--) {
#pragma unroll
                    for (int pair = 0; pair < kPairs; pair++) {
                        if (ranks + r >= v.world || first + pair * 64 + lane * 2 >= words) continue;
                        if (!are_of(x[r][pair], e.number)) late = ranks + r;
                    }
                }
                const bool seen = late == v.world;
                if (__all_sync(kAllLanes, seen)) break;
                if (spins % kSpins == 0 && give_up(v, e, lowest(seen, late))) return false;
            }
#pragma unroll
            for (int r = 0; r < kRanksTogether; r++) {
                const int rank = ranks + r;
                if (rank >= v.world) continue;
                // Asked by all lanes alike.
                const float weight = __shfl_sync(kAllLanes, rank < 32 ? w.weight[0] : w.weight[1], rank % 32);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    const float2 a = wire.unpack(data_of(x[r][pair].x)), b = wire.unpack(data_of(x[r][pair].y));
                    const auto add = [&](float& to, float from) { to = fmaf(weight, from, to); };
                    add(acc[pair][0].x, a.x), add(acc[pair][0].y, a.y);
                    add(acc[pair][1].x, b.x), add(acc[pair][1].y, b.y);
                }
            }
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int n = first + pair * 64 + lane * 2;
            if (n >= words) continue;
            take(n, acc[pair][0], acc[pair][1]);
        }
    }
    end(w.scale, w.fault);
    return true;
}

// One warp merges a row of any size that is its rank's, and writes it, or pushes it to every rank. One function for both:
// ptxas compiles it anew for every kernel. False: the communicator is broken.
static __device__ __noinline__ bool merge_large_row(const MergeStep* step, Epoch& e, int64_t row, bool pushes) {
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    if (!e.has_headers) {
        if (!wait_headers(v, e, 0)) return false;
        dependency_launch();
    }
    const Wire wire(v.wire_dtype);
    const OutputRow to(m, row);
    const int64_t at = merged_begin(v, e) + kHeaderWords + row * row_words(m.target.dim, v.wire_dtype);
    const auto push = [&](int64_t word, uint32_t x, uint32_t y) {
#pragma unroll 1
        for (int n = 1; n <= v.world; n++) {
            uint64_t* window = reinterpret_cast<uint64_t*>(v.bases[(v.rank + n) % v.world]);
            store_words(window + word, packet(x, e.number), packet(y, e.number));
        }
    };
    const auto take = [&](int n, float2 a, float2 b) {
        if (pushes) {
            push(at + kRowHead + n, wire.pack(a), wire.pack(b));
        } else {
            write_words(m.target, wire, to, n, a, b);
        }
    };
    const auto end = [&](const RowScale& scale, uint32_t fault) {
        if (threadIdx.x % 32 != 0) return;
        const float lse = scale.lse();
        if (pushes) {
            push(at, __float_as_uint(lse), second_word(make_float2(lse, 0.f), fault));
        } else {
            if (to.lse != nullptr) *to.lse = lse * m.target.from_natural;
            report_bad_data(v, e.parity(), fault);
        }
    };
    return merge_row(m, e, row, take, end);
}

// One warp waits for a row that its owner has merged, and writes it.
static __device__ __noinline__ bool write_received(const MergeStep* step, Epoch& e, int64_t row) {
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    const Wire wire(v.wire_dtype);
    const OutputRow to(m, row);
    const int lane = threadIdx.x % 32;
    const int words = static_cast<int>(row_words(m.target.dim, v.wire_dtype));
    const int head = static_cast<int>((m.first_row + row) % v.heads);
    const uint64_t* from = v.window + merged_begin(v, e) + kHeaderWords + row * words;
#pragma unroll 1
    for (int first = 0; first < words; first += 64) {
        const int n = first + lane * 2;
        bool seen = n >= words;
        for (int spins = 1;; spins++) {
            ulonglong2 x = {};
            if (!seen) {
                x = load_words(from + n);
                seen = are_of(x, e.number);
                if (seen && n == 0) {
                    const float2 lse = lse_of(data_of(x.x), data_of(x.y));
                    if (to.lse != nullptr) *to.lse = lse.x * m.target.from_natural;
                    report_bad_data(v, e.parity(), fault_of(lse, data_of(x.y)));
                } else if (seen) {
                    write_words(m.target, wire, to, n - kRowHead, wire.unpack(data_of(x.x)), wire.unpack(data_of(x.y)));
                }
            }
            if (__all_sync(kAllLanes, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, owner_of(head, v.heads, v.world))) return false;
        }
    }
    return true;
}

}  // namespace treeattn
