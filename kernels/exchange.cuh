// The exchange of partials between ranks: what one rank pushes, and how rows that came are merged.
//
// Every rank merges in rank order by one routine (the largest log-sum-exp first, then a left fold, empty partials skipped),
// and takes its own partial from its own window as well, through the wire's type like the others. So all ranks that merge
// a row hold the same bits.
#pragma once

#include "ll.cuh"
#include "numbers.cuh"

namespace treeattn {

constexpr int kRanksTogether = 4;   // whose words are asked for before the first is looked at: they come at the same time
constexpr int kWordsAPass = 128;    // of a row's o that a warp holds at a time: 4 words a lane
constexpr int kPairs = kWordsAPass / 64;

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

// Which rows of a launch are a rank's: those of `own` heads from `first` on. Rows are numbered from the launch's first.
struct Rows {
    int64_t begin, before;
    int heads, first, own;
    int64_t count;

    __device__ __forceinline__ Rows(const ExchangeParams& p, int first_head, int own_heads)
        : begin(p.first_row), heads(p.view.heads), first(first_head), own(own_heads) {
        before = owned_until(begin);
        count = owned_until(begin + p.rows) - before;
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

// A row of the output. `row` counts from the launch's first.
struct OutputRow {
    char* o;
    float* lse;

    __device__ __forceinline__ OutputRow(const ExchangeParams& p, int64_t row) {
        const int64_t flat = p.first_row + row, token = flat / p.view.heads;
        const int64_t head = flat - token * p.view.heads - p.view.first_head;
        o = p.target.row(token, head);
        lse = p.target.lse_of(token, head);
    }
};

// Writes up to two elements of an output row.
__device__ __forceinline__ void write_elements(const ExchangeParams& p, const OutputRow& to, int d, int n, float2 x) {
    const RowTarget& target = p.target;
    char* at = to.o + d * target.o_stride[2];
    if (d + 1 < target.dim && n == 2) {
        store_two(at, target.o_stride[2], target.dtype, x);
    } else if (d < target.dim) {
        store_element(at, target.dtype, x.x);
    }
}

// One warp writes NaN.
static __device__ __noinline__ void poison_row(const ExchangeParams& p, int64_t row) {
    const OutputRow to(p, row);
    for (int d = threadIdx.x % 32; d < p.target.dim; d += 32) {
        store_element(to.o + d * p.target.o_stride[2], p.target.dtype, not_a_number());
    }
    if (to.lse != nullptr && threadIdx.x % 32 == 0) *to.lse = not_a_number();
}

// Calls `send(slot's row)` for every rank that gets a row.
template <class Send>
__device__ __forceinline__ void for_receivers(const ExchangeView& v, const Epoch& e, int head, int64_t at, Send send) {
    if (v.mode == kOneShot) {
        // The own window last: the others' words have the longer way.
#pragma unroll 1
        for (int n = 1; n <= v.world; n++) send(slot_at(v, e, (v.rank + n) % v.world) + at);
    } else {
        send(slot_at(v, e, owner_of(head, v.heads, v.world)) + at);
    }
}

// One warp pushes a row of this rank's partial. `fault`: the step's bad data, for the wire.
__device__ __forceinline__ void push_row(const ExchangeParams& p, const Epoch& e, int64_t row, uint32_t fault) {
    const ExchangeView& v = p.view;
    const Wire wire(v.wire_dtype);
    const int lane = threadIdx.x % 32, size = wire.elements_a_word();
    const int64_t flat = p.first_row + row, token = flat / v.heads, head = flat - token * v.heads;
    const RowSource& source = p.source;
    const int64_t words = row_words(source.dim, v.wire_dtype), at = kHeaderWords + row * words;
    const float lse = source.natural(*reinterpret_cast<const float*>(source.lse_of(token, head)));
    const char* o = source.row(token, head);
    const auto element = [&](int d) {
        // An empty partial's o is never read.
        const bool there = d < source.dim && lse != -infinity();
        return there ? load_element(o + d * source.o_stride[2], source.dtype) : 0.f;
    };
    const auto word = [&](int n) {
        const int d = n * size;
        return packet(wire.pack(make_float2(element(d), size == 2 ? element(d + 1) : 0.f)), e.number);
    };
    if (lane == 0) {
        const uint64_t first = packet(__float_as_uint(lse), e.number), second = packet(fault, e.number);
        for_receivers(v, e, static_cast<int>(head), at, [&](uint64_t* to) { store_words(to, first, second); });
    }
#pragma unroll 1
    for (int n = lane * 2; n < words - kRowHead; n += 64) {
        const uint64_t x = word(n), y = word(n + 1);
        for_receivers(v, e, static_cast<int>(head), at + kRowHead + n, [&](uint64_t* to) { store_words(to, x, y); });
    }
}

// The log-sum-exps of a row and what follows from them; lane r has those of ranks r and r + 32.
struct Weights {
    float lse[2];
    float weight[2];
    double sum;      // of all weights, before they were rounded
    float top;
    int live;
    bool bad;
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
                    const uint32_t fault = data_of(words.y);
                    if (fault != 0 && (w.fault == 0 || fault < w.fault)) w.fault = fault;
                }
            }
            if (__all_sync(kWholeWarp, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, lowest(seen, rank))) return false;
        }
    }
    w.bad = __any_sync(kWholeWarp, !(w.lse[0] < infinity()) || !(w.lse[1] < infinity()));
    w.top = fmaxf(w.lse[0], w.lse[1]);
    w.live = (w.lse[0] != -infinity()) + (w.lse[1] != -infinity());
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        w.top = fmaxf(w.top, __shfl_xor_sync(kWholeWarp, w.top, d));
        w.live += __shfl_xor_sync(kWholeWarp, w.live, d);
        const uint32_t other = __shfl_xor_sync(kWholeWarp, w.fault, d);
        if (other != 0 && (w.fault == 0 || other < w.fault)) w.fault = other;
    }
    w.sum = 0.0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half * 32 >= v.world) continue;
        const bool empty = w.lse[half] == -infinity() || w.bad;
        const double weight = empty ? 0.0 : exp(static_cast<double>(w.lse[half]) - w.top);
        w.weight[half] = static_cast<float>(weight);
        for (int rank = 0; rank < min(v.world - half * 32, 32); rank++) w.sum += __shfl_sync(kWholeWarp, weight, rank);
    }
    return true;
}

// One warp merges a row: waits for every rank's words and gives the merged ones, two at a time, to
// `take(word of o, its elements, those of the next word)`, then the lse to `end`. False: the communicator is broken.
template <class Take, class End>
__device__ __forceinline__ bool merge_row(const ExchangeParams& p, Epoch& e, int64_t row, Take take, End end) {
    const ExchangeView& v = p.view;
    const Wire wire(v.wire_dtype);
    const int lane = threadIdx.x % 32;
    const int words = static_cast<int>(row_words(p.target.dim, v.wire_dtype)) - kRowHead;
    const int64_t at = kHeaderWords + row * (words + kRowHead);
    Weights w;
    if (!wait_weights(v, e, at, w)) return false;
    const double scale = w.live <= 1 ? 1.0 : 1.0 / w.sum;
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
                const float lse = __shfl_sync(kWholeWarp, rank < 32 ? w.lse[0] : w.lse[1], rank % 32);
                const float weight = __shfl_sync(kWholeWarp, rank < 32 ? w.weight[0] : w.weight[1], rank % 32);
                if (lse == -infinity()) continue;
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    const float2 a = wire.unpack(data_of(x[r][pair].x)), b = wire.unpack(data_of(x[r][pair].y));
                    const auto add = [&](float& to, float from) { to = w.live == 1 ? from : fmaf(weight, from, to); };
                    add(acc[pair][0].x, a.x), add(acc[pair][0].y, a.y);
                    add(acc[pair][1].x, b.x), add(acc[pair][1].y, b.y);
                }
            }
        }
        const auto finish = [&](float x) {
            if (w.bad) return not_a_number();
            return w.live <= 1 ? x : static_cast<float>(x * scale);
        };
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int n = first + pair * 64 + lane * 2;
            if (n >= words) continue;
            const float2 a = make_float2(finish(acc[pair][0].x), finish(acc[pair][0].y));
            const float2 b = make_float2(finish(acc[pair][1].x), finish(acc[pair][1].y));
            take(n, a, b);
        }
    }
    float lse = w.live <= 1 ? w.top : static_cast<float>(w.top + log(w.sum));
    if (w.bad) lse = not_a_number();
    end(lse, w.fault);
    return true;
}

// Tells the host of bad data that came with a row. One thread.
__device__ __forceinline__ void report_bad_data(const ExchangeView& v, uint32_t fault) {
    if (fault == 0) return;
    atomicMax(reinterpret_cast<unsigned long long*>(v.host + kBadData),
              static_cast<unsigned long long>(unpack_fault(fault)));
}

// Writes the elements of two neighbouring words of o.
__device__ __forceinline__ void write_words(const ExchangeParams& p, const Wire& wire, const OutputRow& to, int n,
                                            float2 a, float2 b) {
    if (wire.is_f32) {
        write_elements(p, to, n, 2, make_float2(a.x, b.x));
    } else {
        write_elements(p, to, n * 2, 2, a);
        write_elements(p, to, n * 2 + 2, 2, b);
    }
}

// One warp merges a row and writes it.
__device__ __forceinline__ bool write_merged(const ExchangeParams& p, Epoch& e, int64_t row) {
    const Wire wire(p.view.wire_dtype);
    const OutputRow to(p, row);
    return merge_row(
        p, e, row, [&](int n, float2 a, float2 b) { write_words(p, wire, to, n, a, b); },
        [&](float lse, uint32_t fault) {
            if (threadIdx.x % 32 != 0) return;
            if (to.lse != nullptr) *to.lse = lse;
            report_bad_data(p.view, fault);
        });
}

// One warp merges a row that is its rank's and pushes it to every rank.
__device__ __forceinline__ bool push_merged(const ExchangeParams& p, Epoch& e, int64_t row) {
    const ExchangeView& v = p.view;
    const Wire wire(v.wire_dtype);
    const int64_t at = kHeaderWords + row * row_words(p.target.dim, v.wire_dtype);
    const auto push = [&](int64_t to, uint32_t x, uint32_t y) {
#pragma unroll 1
        for (int n = 1; n <= v.world; n++) {
            store_words(merged_slot(v, e, (v.rank + n) % v.world) + to, packet(x, e.number), packet(y, e.number));
        }
    };
    return merge_row(
        p, e, row, [&](int n, float2 a, float2 b) { push(at + kRowHead + n, wire.pack(a), wire.pack(b)); },
        [&](float lse, uint32_t fault) {
            if (threadIdx.x % 32 == 0) push(at, __float_as_uint(lse), fault);
        });
}

// One warp waits for a row that its owner has merged, and writes it.
__device__ __forceinline__ bool write_received(const ExchangeParams& p, Epoch& e, int64_t row) {
    const ExchangeView& v = p.view;
    const Wire wire(v.wire_dtype);
    const OutputRow to(p, row);
    const int lane = threadIdx.x % 32;
    const int words = static_cast<int>(row_words(p.target.dim, v.wire_dtype));
    const int head = static_cast<int>((p.first_row + row) % v.heads);
    const uint64_t* from = merged_slot(v, e, v.rank) + kHeaderWords + row * words;
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
                    write_words(p, wire, to, n - kRowHead, wire.unpack(data_of(x.x)), wire.unpack(data_of(x.y)));
                }
            }
            if (__all_sync(kWholeWarp, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, owner_of(head, v.heads, v.world))) return false;
        }
    }
    return true;
}

// What comes after a rank's pushes: waits for all ranks, merges or receives this rank's rows and writes them, NaN where the
// communicator is broken. By warp `warp` of `warps` that do it.
__device__ __forceinline__ void receive(const ExchangeParams& p, Epoch& e, int64_t warp, int64_t warps) {
    const ExchangeView& v = p.view;
    delay(DelayPoint::kWait, e.number);
    if (!e.broken) wait_headers(v, e);
    if (v.mode == kTwoShot) {
        const int first = first_head_of(v.rank, v.heads, v.world);
        const Rows own(p, first, first_head_of(v.rank + 1, v.heads, v.world) - first);
        for (int64_t n = warp; n < own.count && !e.broken; n += warps) push_merged(p, e, own.at(n));
    }
    const Rows mine(p, v.first_head, v.own_heads);
    for (int64_t n = warp; n < mine.count; n += warps) {
        const int64_t row = mine.at(n);
        const bool written = !e.broken && (v.mode == kTwoShot ? write_received(p, e, row) : write_merged(p, e, row));
        if (!written) poison_row(p, row);
    }
    delay(DelayPoint::kConsume, e.number);
}

// The end of a launch's part in an exchange, by one thread of each of its blocks once all of the block have read what
// came: the last one makes room for the next epoch. `is_last`: of the step's exchanges.
__device__ __forceinline__ void consume(const ExchangeView& v, const Epoch& e, uint32_t blocks, bool is_last) {
    if (count_arrival(reinterpret_cast<uint32_t*>(v.window + kArrived), blocks - 1) != blocks - 1) return;
    if (is_last) {
        // Bad data that no row may have told this rank of: it has none, or none of that sequence.
        report_bad_data(v, pack_fault(load_word(v.window + kFault), v.rank));
        store_word(v.window + kFault, 0);
    }
    if (load_word(v.window + kFailed) == 0) store_word(v.window + kConsumed, e.number);
}

}  // namespace treeattn
