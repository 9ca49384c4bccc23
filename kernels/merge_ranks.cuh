// How one warp merges a row of all ranks' partials, out of what they pushed into this rank's window.
//
// Every rank merges in rank order by the same arithmetic (the largest log-sum-exp first, then a left fold), and takes its own
// partial from its own window as well, through the wire's type like the others. So all ranks that merge a row hold the same
// bits.
//
// What follows the last word's arrival is what a step waits for, so it is short: instructions that run for the first time
// after a while come from memory.
#pragma once

#include "ll.cuh"
#include "numbers.cuh"

namespace treeattn {

constexpr int kRanksTogether = 4;  // whose words are asked for before the first is looked at: they come at the same time
constexpr int kWordsAPass = 128;   // of a row's o that a warp holds at a time: 4 words a lane
constexpr int kPairs = kWordsAPass / 64;
constexpr int kEager = 16;         // looks at all that is missing before a warp looks at one word only
constexpr int kAwake = 32;         // looks before it sleeps between them

// What merging needs to know of a step; in shared memory, so that it is at hand.
struct MergeStep {
    ExchangeView view;
    RowTarget target;  // [token, own head, dim]
    int64_t first_row;
    int64_t rows;      // of the launch
    int64_t count;     // of them, those of this rank
    int32_t waiting;   // how many blocks, the last of the grid, may wait for ranks that have not come
    int32_t ticket;    // of the block, see receive
};

// Delays for tests of the protocol, up to TREEATTN_DELAYS nanoseconds; nothing in other builds.
enum class DelayPoint : uint32_t { kPush = 1, kWait = 2, kConsume = 3 };
__device__ __forceinline__ void delay(DelayPoint point, uint32_t epoch) {
#ifdef TREEATTN_DELAYS
    uint32_t x = epoch * 2654435761u ^ blockIdx.x * 40503u ^ threadIdx.x / 32 * 977u ^ static_cast<uint32_t>(point) << 20;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    // Most come at once, so that the others are late.
    if (x % 4 != 0) return;
    const uint64_t until = nanoseconds() + (x >> 2) % TREEATTN_DELAYS;
    while (nanoseconds() < until) {
    }
#endif
}

// Two elements as words of o on the wire, and back. For f32 a word is one element, else two.
struct Wire {
    bool is_f32, is_bf16;

    __device__ __forceinline__ explicit Wire(int32_t dtype) : is_f32(dtype == kF32), is_bf16(dtype == kBf16) {}

    __device__ __forceinline__ int elements_a_word() const { return is_f32 ? 1 : 2; }
    __device__ __forceinline__ uint32_t pack(float2 x) const {
        if (is_f32) return __float_as_uint(x.x);
        return is_bf16 ? pack_pair<true>(x.x, x.y) : pack_pair<false>(x.x, x.y);
    }
    __device__ __forceinline__ float2 unpack(uint32_t bits) const {
        if (is_f32) return make_float2(__uint_as_float(bits), 0.f);
        return is_bf16 ? unpack_pair<true>(bits) : unpack_pair<false>(bits);
    }
};

// The token of flat row x. Wide divisions are a call and a hundred instructions.
__device__ __forceinline__ int64_t token_of(int64_t x, int heads) {
    return x >> 32 == 0 ? static_cast<uint32_t>(x) / static_cast<uint32_t>(heads) : x / heads;
}

// A row of the output. `row` counts from the launch's first.
struct OutputRow {
    char* o;
    float* lse;

    __device__ __forceinline__ OutputRow(const MergeStep& m, int64_t row) {
        const int64_t flat = m.first_row + row, token = token_of(flat, m.view.heads);
        const int64_t head = flat - token * m.view.heads - m.view.first_head;
        o = m.target.row(token, head);
        lse = m.target.lse_of(token, head);
    }
};

// Writes two neighbouring elements of an output row, as many as there are.
__device__ __forceinline__ void write_elements(const RowTarget& target, const OutputRow& to, int d, float2 x) {
    char* at = to.o + d * target.o_stride[2];
    if (d + 1 < target.dim) {
        store_two(at, target.o_stride[2], target.dtype, x);
    } else if (d < target.dim) {
        store_element(at, target.dtype, x.x);
    }
}

// Writes the elements of two neighbouring words of o.
__device__ __forceinline__ void write_words(const RowTarget& target, const Wire& wire, const OutputRow& to, int n, float2 a,
                                            float2 b) {
    if (wire.is_f32) {
        write_elements(target, to, n, make_float2(a.x, b.x));
    } else {
        write_elements(target, to, n * 2, a);
        write_elements(target, to, n * 2 + 2, b);
    }
}

// One warp writes NaN.
static __device__ __noinline__ void poison_row(const MergeStep* step, int64_t row) {
    const MergeStep& m = *step;
    const OutputRow to(m, row);
    for (int d = threadIdx.x % 32; d < m.target.dim; d += 32) {
        store_element(to.o + d * m.target.o_stride[2], m.target.dtype, not_a_number());
    }
    if (to.lse != nullptr && threadIdx.x % 32 == 0) *to.lse = not_a_number();
}

// Tells the host of bad data of some rank. One thread.
__device__ __forceinline__ void report_bad_data(const ExchangeView& v, uint32_t fault) {
    if (fault == 0) return;
    atomicMax(reinterpret_cast<unsigned long long*>(v.host + kBadData),
              static_cast<unsigned long long>(unpack_fault(fault)));
}

// Of two words of bad data, that of the first sequence; 0 is none.
__device__ __forceinline__ uint32_t first_fault(uint32_t a, uint32_t b) { return min(a - 1, b - 1) + 1; }

// exp(x) for x <= 0, to a unit in the last place; 0 below the normal floats. exp in fp64 takes several times as long, on
// the way of every row.
__device__ __forceinline__ float weight_of(float x) {
    const float bounded = fmaxf(x, -200.f), n = rintf(bounded * kLog2E);
    const float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, bounded));
    float y = 1.37805939e-3f;
    y = fmaf(y, r, 8.37312452e-3f);
    y = fmaf(y, r, 4.16695364e-2f);
    y = fmaf(y, r, 1.66664720e-1f);
    y = fmaf(y, r, 4.99999851e-1f);
    y = fmaf(y, r, 1.f);
    y = fmaf(y, r, 1.f);
    // y lies between 0.7 and 1.42.
    return n < -125.f ? 0.f : __int_as_float(__float_as_int(y) + (static_cast<int>(n) << 23));
}

// The sum of a row's weights, as a float and what that lacks.
struct WeightSum {
    float high, low;

    __device__ __forceinline__ void add(float x) {
        const float sum = high + x, part = sum - high;
        low += (high - (sum - part)) + (x - part);
        high = sum;
    }
};

// What follows from the log-sum-exps of a row.
struct RowScale {
    float top;       // the largest
    bool bad;        // one is not a number, or +inf
    WeightSum sum;   // of the weights of all ranks
    float inverse, rest;  // of the sum, as a float and what that lacks

    // A rank's weight before it is divided by the sum; 0 where it is empty. Its o is zero then.
    __device__ __forceinline__ float weight(float lse) const { return lse == -infinity() ? 0.f : weight_of(lse - top); }
    __device__ __forceinline__ void invert() {
        if (top == -infinity()) sum.high = 1.f;
        inverse = __fdividef(1.f, sum.high);
        rest = inverse * fmaf(-sum.low, inverse, fmaf(-sum.high, inverse, 1.f));
        if (bad) inverse = not_a_number();
    }
    // The weight by which o is multiplied; not a number where the row is bad.
    __device__ __forceinline__ float share(float weight) const { return fmaf(weight, inverse, weight * rest); }
    // The merged lse.
    __device__ __forceinline__ float lse() const {
        return bad ? not_a_number() : top + (logf(sum.high) + sum.low * inverse);
    }
};

// How a try to merge a row ended, in one register. The words that lie in the window stay there: another try finds them.
enum MergeTry : uint32_t {
    kMerged = 0,
    kLate = 1,            // a rank has not come: which one is above kLateShift
    kOutOfStep = 2,       // ranks have come for different steps
    kOutcome = 3,         // the bits of these
    kAllHeaders = 4,      // added: every rank has said that it has come, and for the same
    kLateShift = 8,
};

// One warp tries to merge a row of at most kRanks ranks and kPairs * 64 words, and to write it to `to`. The headers, where
// the warp has not seen them, the log-sum-exps and the words of all ranks are asked for together, and what has come is kept.
// It looks for a while; after `eager` looks at one word only, and not before the headers have come, because the looks of many
// warps slow down those that still attend.
//
// It calls nothing: registers that a call would have to leave alone went to memory, and the loads one after the other.
template <int kRanks, int kPairs>
static __device__ __noinline__ uint32_t merge_row_at_once(const MergeStep* step, uint32_t epoch, bool has_headers, int64_t row,
                                                          OutputRow to, int eager) {
    constexpr int kGroup = kRanks * kPairs <= 8 ? kRanks : 8 / kPairs;  // ranks whose words are on their way together
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

    float lse[kRanks];
    uint32_t data[kRanks][kPairs][2], fault = 0;
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
        lse[r] = -infinity();
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
                if (!__all_sync(kWholeWarp, come)) continue;
                missing &= ~(1u << (first + r));
                lse[first + r] = __uint_as_float(data_of(head[r].x));
                fault = first_fault(fault, data_of(head[r].y));
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
            if (!__all_sync(kWholeWarp, same)) return kOutOfStep;
            silent = ~__ballot_sync(kWholeWarp, is_here);
            has_headers = silent == 0;
            // Nothing that this step waits for needs room on the GPU any more: the next launch may take it.
            if (has_headers) dependency_launch();
        }

        // Also before all has come, so that the instructions are at hand then: those that were not used for a while come from
        // memory, for as long as words take from GPU to GPU.
        RowScale s{-infinity(), false, {0.f, 0.f}, 0.f, 0.f};
        float weight[kRanks];
#pragma unroll
        for (int r = 0; r < kRanks; r++) s.top = fmaxf(s.top, lse[r]), s.bad |= !(lse[r] < infinity());
#pragma unroll
        for (int r = 0; r < kRanks; r++) weight[r] = s.weight(lse[r]), s.sum.add(weight[r]);
        s.invert();
#pragma unroll
        for (int r = 0; r < kRanks; r++) weight[r] = s.share(weight[r]);
        float out[kPairs][4];
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
        const bool is_done = missing == 0 && has_headers;
        // Once more so that they are at hand.
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
                if (to.lse != nullptr) *to.lse = s.lse();
                report_bad_data(v, fault);
            }
            return kMerged | kAllHeaders;
        }
        const int late = __ffs(missing != 0 ? missing : silent) - 1;
        if (looks < eager) continue;
        if (looks >= kSpins || !has_headers) return kLate | (has_headers ? kAllHeaders : 0u) | late << kLateShift;
        while (looks < kSpins && !__all_sync(kWholeWarp, is_of(load_word(heads + late * slot_words), epoch))) {
            if (looks++ >= eager + kAwake) __nanosleep(kSleep);
        }
    }
}

// The log-sum-exps of a row and what follows from them, of any number of ranks; lane r has those of ranks r and r + 32.
struct Weights {
    float lse[2];
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
        w.lse[half] = -infinity();
        const int rank = half * 32 + lane;
        if (half * 32 >= v.world) continue;
        bool seen = rank >= v.world;
        for (int spins = 1;; spins++) {
            if (!seen) {
                const ulonglong2 words = load_words(slot_of(v, e, rank) + at);
                seen = are_of(words, e.number);
                if (seen) {
                    w.lse[half] = __uint_as_float(data_of(words.x));
                    w.fault = first_fault(w.fault, data_of(words.y));
                }
            }
            if (__all_sync(kWholeWarp, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, lowest(seen, rank))) return false;
        }
    }
    w.scale.bad = __any_sync(kWholeWarp, !(w.lse[0] < infinity()) || !(w.lse[1] < infinity()));
    w.scale.top = fmaxf(w.lse[0], w.lse[1]);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        w.scale.top = fmaxf(w.scale.top, __shfl_xor_sync(kWholeWarp, w.scale.top, d));
        w.fault = first_fault(w.fault, __shfl_xor_sync(kWholeWarp, w.fault, d));
    }
    w.scale.sum = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        w.weight[half] = w.scale.weight(w.lse[half]);
        if (half * 32 >= v.world) continue;
        for (int rank = 0; rank < min(v.world - half * 32, 32); rank++) {
            w.scale.sum.add(__shfl_sync(kWholeWarp, w.weight[half], rank));
        }
    }
    w.scale.invert();
    w.weight[0] = w.scale.share(w.weight[0]), w.weight[1] = w.scale.share(w.weight[1]);
    return true;
}

// One warp merges a row of any size: waits for every rank's words and gives the merged ones, two at a time, to
// `take(word of o, its elements, those of the next word)`, then the lse to `end`. The headers have come. False: the
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
            for (int spins = 1;; spins++) {
                bool seen = true;
                int late = v.world;
#pragma unroll
                for (int r = 0; r < kRanksTogether; r++) {
#pragma unroll
                    for (int pair = 0; pair < kPairs; pair++) {
                        const int n = first + pair * 64 + lane * 2;
                        if (ranks + r >= v.world || n >= words) continue;
                        x[r][pair] = load_words(slot_of(v, e, ranks + r) + at + kRowHead + n);
                    }
                }
#pragma unroll
                for (int r = 0; r < kRanksTogether; r++) {
#pragma unroll
                    for (int pair = 0; pair < kPairs; pair++) {
                        const int n = first + pair * 64 + lane * 2;
                        if (ranks + r >= v.world || n >= words || are_of(x[r][pair], e.number)) continue;
                        seen = false, late = min(late, ranks + r);
                    }
                }
                if (__all_sync(kWholeWarp, seen)) break;
                if (spins % kSpins == 0 && give_up(v, e, lowest(seen, late))) return false;
            }
#pragma unroll
            for (int r = 0; r < kRanksTogether; r++) {
                const int rank = ranks + r;
                if (rank >= v.world) continue;
                // Asked by all lanes alike.
                const float weight = __shfl_sync(kWholeWarp, rank < 32 ? w.weight[0] : w.weight[1], rank % 32);
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
    end(w.scale.lse(), w.fault);
    return true;
}

// One warp merges a row of any size and writes it.
static __device__ __noinline__ bool merge_large_row(const MergeStep* step, Epoch& e, int64_t row) {
    const MergeStep& m = *in_shared(step);
    if (!e.has_headers) {
        if (!wait_headers(m.view, e, 0)) return false;
        dependency_launch();
    }
    const Wire wire(m.view.wire_dtype);
    const OutputRow to(m, row);
    return merge_row(
        m, e, row, [&](int n, float2 a, float2 b) { write_words(m.target, wire, to, n, a, b); },
        [&](float lse, uint32_t fault) {
            if (threadIdx.x % 32 != 0) return;
            if (to.lse != nullptr) *to.lse = lse;
            report_bad_data(m.view, fault);
        });
}

// One warp merges a row and writes it. False: the communicator is broken.
static __device__ __noinline__ bool write_merged(const MergeStep* step, Epoch& e, int64_t row) {
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    const int words = static_cast<int>(row_words(m.target.dim, v.wire_dtype)) - kRowHead, world = v.world;
    const OutputRow to(m, row);
    for (int eager = kEager;; eager = 1) {
        uint32_t made;
        if (words <= 128 && world <= 2) {
            made = merge_row_at_once<2, 2>(step, e.number, e.has_headers, row, to, eager);
        } else if (words <= 128 && world <= 4) {
            made = merge_row_at_once<4, 2>(step, e.number, e.has_headers, row, to, eager);
        } else if (words <= 128 && world <= 8) {
            made = merge_row_at_once<8, 2>(step, e.number, e.has_headers, row, to, eager);
        } else if (words <= 256 && world <= 4) {
            made = merge_row_at_once<4, 4>(step, e.number, e.has_headers, row, to, eager);
        } else {
            return merge_large_row(step, e, row);
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

// One warp merges a row that is its rank's and pushes it to every rank.
static __device__ __noinline__ bool push_merged(const MergeStep* step, Epoch& e, int64_t row) {
    const MergeStep& m = *in_shared(step);
    const ExchangeView& v = m.view;
    const Wire wire(v.wire_dtype);
    const int64_t at = merged_begin(v, e) + kHeaderWords + row * row_words(m.target.dim, v.wire_dtype);
    const auto push = [&](int64_t to, uint32_t x, uint32_t y) {
#pragma unroll 1
        for (int n = 1; n <= v.world; n++) {
            uint64_t* window = reinterpret_cast<uint64_t*>(v.bases[(v.rank + n) % v.world]);
            store_words(window + to, packet(x, e.number), packet(y, e.number));
        }
    };
    return merge_row(
        m, e, row, [&](int n, float2 a, float2 b) { push(at + kRowHead + n, wire.pack(a), wire.pack(b)); },
        [&](float lse, uint32_t fault) {
            if (threadIdx.x % 32 == 0) push(at, __float_as_uint(lse), fault);
        });
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
                    if (to.lse != nullptr) *to.lse = __uint_as_float(data_of(x.x));
                    report_bad_data(v, data_of(x.y));
                } else if (seen) {
                    write_words(m.target, wire, to, n - kRowHead, wire.unpack(data_of(x.x)), wire.unpack(data_of(x.y)));
                }
            }
            if (__all_sync(kWholeWarp, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, owner_of(head, v.heads, v.world))) return false;
        }
    }
    return true;
}

}  // namespace treeattn
