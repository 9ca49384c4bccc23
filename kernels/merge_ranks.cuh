// How one warp merges a row of all ranks' partials, out of what they pushed into this rank's window.
//
// What follows the last word's arrival is what a step waits for, so it is short: instructions that run for the first time
// after a while come from memory.
#pragma once

#include "merge_large.cuh"

namespace treeattn {

constexpr int kEager = 16;         // looks at all that is missing before a warp looks at one word only
constexpr int kAwake = 32;         // looks before it sleeps between them

// How a try to merge a row ended, in one register. The words that lie in the window stay there: another try finds them.
enum MergeTry : uint32_t {
    kMerged = 0,
    kLate = 1,            // a rank has not come: which one is above kLateShift
    kOutOfStep = 2,       // ranks have come for different steps
    kOutcome = 3,         // the bits of these
    kAllHeaders = 4,      // added: every rank has said that it has come, and for the same
    kLateShift = 8,
};

// Merges what a lane has of all ranks' words of a row. Whoever merges a row so makes the same bits of it.
template <int kRanks, int kPairs>
__device__ __forceinline__ RowScale merge_words(const Wire& wire, const float2 (&lse)[kRanks],
                                                const uint32_t (&data)[kRanks][kPairs][2], float (&out)[kPairs][4]) {
    RowScale s{{-infinity(), 0.f}, false, {0.f, 0.f}, 0.f, 0.f};
    float weight[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
        if (lse[r].x > s.top.x) s.top = lse[r];
        s.bad |= !(lse[r].x < infinity());
    }
#pragma unroll
    for (int r = 0; r < kRanks; r++) weight[r] = s.weight(lse[r]), s.sum.add(weight[r]);
    s.invert();
#pragma unroll
    for (int r = 0; r < kRanks; r++) weight[r] = s.share(weight[r]);
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[pair][i] = 0.f;
#pragma unroll
        for (int r = 0; r < kRanks; r++) {
            if (wire.is_f32) {
                out[pair][0] = fmaf(weight[r], __uint_as_float(data[r][pair][0]), out[pair][0]);
                out[pair][1] = fmaf(weight[r], __uint_as_float(data[r][pair][1]), out[pair][1]);
            } else {
                const float2 a = wire.unpack(data[r][pair][0]), b = wire.unpack(data[r][pair][1]);
                out[pair][0] = fmaf(weight[r], a.x, out[pair][0]), out[pair][1] = fmaf(weight[r], a.y, out[pair][1]);
                out[pair][2] = fmaf(weight[r], b.x, out[pair][2]), out[pair][3] = fmaf(weight[r], b.y, out[pair][3]);
            }
        }
    }
    return s;
}

// One warp tries to merge a row of at most kRanks ranks and kPairs * 64 words, and to write it to `to`. The headers, where
// the warp has not seen them, the log-sum-exps and the words of all ranks are asked for together, and what has come is kept.
// It looks for a while; after `eager` looks at one word only, and not before the headers have come, because the looks of many
// warps slow down those that still attend.
//
// It calls nothing: registers that a call would have to leave alone went to memory, and the loads one after the other.
template <int kRanks, int kPairs>
static __device__ __noinline__ uint32_t merge_row_at_once(const MergeStep* step, uint32_t epoch, bool has_headers, int64_t row,
                                                          OutputRow to, int eager) {
    // Ranks whose words are on their way together: fewer where what has come takes many registers, or callers would spill theirs.
    constexpr int kAtOnce = kRanks == 8 && kPairs > 1 ? 4 : 8;
    constexpr int kGroup = kRanks * kPairs <= kAtOnce ? kRanks : kAtOnce / kPairs;
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    const int lane = threadIdx.x % 32, world = v.world;
    const int words = static_cast<int>(row_words(m.target.dim, v.wire_dtype)) - kRowHead;
    const int64_t slot_words = v.slot_words;
    const uint64_t fingerprint = v.fingerprint;
    const uint64_t* const slots = v.window + kControlWords + epoch % kSlots * v.parity_words;
    const uint64_t* const heads = slots + kHeaderWords + row * (words + kRowHead);
    const Wire wire(v.wire_dtype);
    // Whether lanes write neighbouring elements of 16 bits each, as most outputs are.
    const int a_lane = wire.elements_a_word() * 4;  // bytes
    const bool is_bf16 = m.target.dtype == kBf16;
    const bool is_packed = m.target.dtype != kF32 && m.target.o_stride[2] == 2 && m.target.dim % (a_lane / 2) == 0 &&
                           (reinterpret_cast<uintptr_t>(to.o) & (a_lane - 1)) == 0;
    char* const packed = to.o + lane * a_lane;

    float2 lse[kRanks];
    uint32_t data[kRanks][kPairs][2], fault = 0;
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
        lse[r] = make_float2(-infinity(), 0.f);
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) data[r][pair][0] = data[r][pair][1] = 0;
    }
    uint32_t missing = (1u << world) - 1;  // ranks whose row has not come
#pragma unroll 1
    for (int looks = 1;; looks++) {
        ulonglong2 header = {};
        if (!has_headers && lane < world) header = load_words(slots + lane * slot_words);
#pragma unroll
        for (int first = 0; first < kRanks; first += kGroup) {
            ulonglong2 head[kGroup] = {}, x[kGroup][kPairs] = {};
#pragma unroll
            for (int r = 0; r < kGroup; r++) {
                if (!(missing >> (first + r) & 1)) continue;
                const uint64_t* from = heads + (first + r) * slot_words;
                head[r] = load_words(from);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    // Lanes past the last word look at the head once more.
                    const int n = pair * 64 + lane * 2;
                    x[r][pair] = load_words(n < words ? from + kRowHead + n : from);
                }
            }
#pragma unroll
            for (int r = 0; r < kGroup; r++) {
                if (!(missing >> (first + r) & 1)) continue;
                bool come = are_of(head[r], epoch);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) come &= are_of(x[r][pair], epoch);
                if (!__all_sync(kAllLanes, come)) continue;
                missing &= ~(1u << (first + r));
                lse[first + r] = lse_of(data_of(head[r].x), data_of(head[r].y));
                fault = first_fault(fault, fault_of(lse[first + r], data_of(head[r].y)));
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    data[first + r][pair][0] = data_of(x[r][pair].x), data[first + r][pair][1] = data_of(x[r][pair].y);
                }
            }
        }
        uint32_t silent = 0;  // ranks whose header has not come
        if (!has_headers) {
            const bool is_here = lane >= world || are_of(header, epoch);
            const bool same = lane >= world || !is_here || fingerprint_of(header) == fingerprint;
            if (!__all_sync(kAllLanes, same)) return kOutOfStep;
            silent = ~__ballot_sync(kAllLanes, is_here);
            has_headers = silent == 0;
            // Nothing that this step waits for needs room on the GPU any more: the next launch may take it.
            if (has_headers) dependency_launch();
        }

        // Also before all has come, so that the instructions lie in the cache then: those that were not used for a while come from
        // memory, for as long as words take from GPU to GPU.
        float out[kPairs][4];
        const RowScale s = merge_words<kRanks, kPairs>(wire, lse, data, out);
        const bool is_done = missing == 0 && has_headers;
        // For the same reason.
        if (is_packed) {
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                const bool is_mine = is_done && pair * 64 + lane * 2 < words;
                if (wire.is_f32) {
                    const uint32_t bits = is_bf16 ? pack_pair<true>(out[pair][0], out[pair][1])
                                                  : pack_pair<false>(out[pair][0], out[pair][1]);
                    if (is_mine) *reinterpret_cast<uint32_t*>(packed + pair * 128) = bits;
                } else {
                    const uint2 bits = is_bf16 ? make_uint2(pack_pair<true>(out[pair][0], out[pair][1]),
                                                            pack_pair<true>(out[pair][2], out[pair][3]))
                                               : make_uint2(pack_pair<false>(out[pair][0], out[pair][1]),
                                                            pack_pair<false>(out[pair][2], out[pair][3]));
                    if (is_mine) *reinterpret_cast<uint2*>(packed + pair * 256) = bits;
                }
            }
        }
        if (is_done) {
            if (!is_packed) {
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    const int n = pair * 64 + lane * 2;
                    if (n >= words) continue;
                    const float2 a = make_float2(out[pair][0], wire.is_f32 ? 0.f : out[pair][1]);
                    const float2 b = wire.is_f32 ? make_float2(out[pair][1], 0.f) : make_float2(out[pair][2], out[pair][3]);
                    write_words(m.target, wire, to, n, a, b);
                }
            }
            if (lane == 0) {
                if (to.lse != nullptr) *to.lse = s.lse() * m.target.from_natural;
                report_bad_data(v, epoch % kSlots, fault);
            }
            return kMerged | kAllHeaders;
        }
        const int late = __ffs(missing != 0 ? missing : silent) - 1;
        if (looks < eager) continue;
        if (looks >= kSpins || !has_headers) return kLate | (has_headers ? kAllHeaders : 0u) | late << kLateShift;
        while (looks < kSpins && !__all_sync(kAllLanes, is_of(load_word(heads + late * slot_words), epoch))) {
            if (looks++ >= eager + kAwake) __nanosleep(kSleep);
        }
    }
}

// One warp merges a row, whose o has at most kMostWords words, and writes it. False: the communicator is broken.
template <int kMostWords>
static __device__ __noinline__ bool write_merged(const MergeStep* step, Epoch& e, int64_t row) {
    constexpr int kFewPairs = kMostWords <= 64 ? 1 : 2;
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    const int words = static_cast<int>(row_words(m.target.dim, v.wire_dtype)) - kRowHead, world = v.world;
    const bool are_few = kMostWords <= 128 || words <= 128;
    const OutputRow to(m, row);
    for (int eager = kEager;; eager = 1) {
        uint32_t made;
        if (are_few && world <= 2) {
            made = merge_row_at_once<2, kFewPairs>(step, e.number, e.has_headers, row, to, eager);
        } else if (are_few && world <= 4) {
            made = merge_row_at_once<4, kFewPairs>(step, e.number, e.has_headers, row, to, eager);
        } else if (are_few && world <= 8) {
            made = merge_row_at_once<8, kFewPairs>(step, e.number, e.has_headers, row, to, eager);
        } else if (!are_few && words <= 256 && world <= 4) {
            made = merge_row_at_once<4, 4>(step, e.number, e.has_headers, row, to, eager);
        } else {
            return merge_large_row(step, e, row, false);
        }
        e.has_headers = (made & kAllHeaders) != 0;
        if ((made & kOutcome) == kMerged) return true;
        if ((made & kOutcome) == kOutOfStep) {
            fail_out_of_step(v, e);
            return false;
        }
        if (e.has_headers) {
            if (give_up(v, e, static_cast<int>(made >> kLateShift))) return false;
            continue;
        }
        if (!wait_headers(v, e, 0)) return false;
        dependency_launch();
    }
}

}  // namespace treeattn
