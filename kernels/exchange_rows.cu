// One exchange of partials whose rows are few enough for a warp each, the usual one: what exchange.cu does, in one piece.
//
// What follows a launch's begin, and then the last word's arrival, is what ranks wait for, and instructions that run for
// the first time take longer to come than to run. So there is one short way through the kernel, without calls; whatever else
// may happen is left to merge_ranks.cuh.
//
// The warp that pushes a row merges it, with its own part out of registers. A row's own part goes to the own window only
// where that warp leaves the row over, or waits for long.
#include "exchange.cuh"

namespace treeattn {

// owner_of for heads whose number times kMaxRanks has 31 bits: wide divisions are a call.
__device__ __forceinline__ int owner_of_few(int head, int heads, int world) {
    return static_cast<int>((static_cast<uint32_t>(head + 1) * world + heads - 1) / static_cast<uint32_t>(heads)) - 1;
}

// As exchange.cuh's `decide`, without a call.
__device__ __forceinline__ bool decide_at_once(const ExchangeView& v, MergeStep& step, const Epoch& e, int nth) {
    if (threadIdx.x < 32) {
        const uint64_t* const in = v.window + kControlWords + e.parity() * v.parity_words;
        const uint64_t until = nanoseconds() + kBriefly;
        bool comes = e.broken;
        while (!comes) {
            const int rank = min(static_cast<int>(threadIdx.x), v.world - 1);
            const ulonglong2 header = load_words(in + rank * v.slot_words);
            comes = __all_sync(kAllLanes, are_of(header, e.number) && fingerprint_of(header) == v.fingerprint);
            if (!comes && __any_sync(kAllLanes, nanoseconds() >= until)) break;
        }
        if (threadIdx.x == 0) {
            step.ticket = comes;
            if (!comes) {
                auto* left = reinterpret_cast<unsigned long long*>(v.window + kLeftOver + e.parity() * kLeftOverWords + nth / 64);
                atomicOr(left, 1ull << nth % 64);
                __threadfence();
            }
            add_word(v.window + kDecided + e.parity(), comes ? 1 : 1 | 1ull << 32);
        }
    }
    __syncthreads();
    return step.ticket != 0;
}

// What the host sees to: o is normalised; rows are pushed to all ranks, or to the owners of their heads; no more rows than warps,
// nor blocks than kLeftOver has bits; a row's o has at most kRowsMostWords words; the elements of source and target lie side by side,
// their rows begin at multiples of 4 of them, and have multiples of 4.
template <int kRanks, bool kPlain>
__device__ __forceinline__ void exchange_rows(const ExchangeParams& p) {
    __shared__ MergeStep step;
    constexpr int kPairs = kRowsMostWords / 64, kGroup = kRanks * kPairs <= 8 ? kRanks : 8 / kPairs;
    const ExchangeView& v = p.view;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int world = v.world, rank = v.rank, blocks = static_cast<int>(gridDim.x);
    const int nth = blocks - 1 - static_cast<int>(blockIdx.x), waiting = min(p.waiting, blocks);
    const bool may_wait = nth < waiting;
    const Wire wire(kPlain ? static_cast<int32_t>(kF32) : v.wire_dtype);

    // What needs no other launch.
    if (threadIdx.x == 64) {
        step.view = p.view;
    } else if (threadIdx.x == 96) {
        step.target = p.target;
        step.first_row = p.first_row, step.rows = p.rows, step.waiting = p.waiting, step.count = p.rows;
    }
    ulonglong2 slots = {};  // of this rank at rank lane, counted as SlotTable does
    if (lane < world) slots = *reinterpret_cast<const ulonglong2*>(v.slots + lane * kSlots);
    const int row = static_cast<int>(blockIdx.x) * warps + warp;
    const bool has_row = row < p.rows;
    const uint32_t flat = static_cast<uint32_t>(p.first_row) + (has_row ? row : 0), token = flat / static_cast<uint32_t>(v.heads);
    const int head = static_cast<int>(flat - token * v.heads);
    const int words = kPlain ? p.source.dim : p.source.dim / wire.elements_a_word();
    const int at = kHeaderWords + row * (words + kRowHead);
    const int owner = v.mode == kOneShot ? rank : owner_of_few(head, v.heads, world);
    const bool merges = has_row && owner == rank;
    // Ranks to which the row goes, in the order of SlotTable.
    int begin = 0, end = has_row ? world - 1 : 0;
    if (v.mode != kOneShot) begin = SlotTable::place_of(owner, rank, world), end = merges ? 0 : min(begin + 1, end);
    const char* const source = p.source.row(token, head);
    const char* const source_lse = p.source.lse_of(token, head);
    const bool is_f32 = kPlain || p.source.dtype == kF32, is_bf16 = p.source.dtype == kBf16;
    const int64_t own_head = head - v.first_head;
    char* const to = p.target.row(token, own_head);
    float* const to_lse = p.target.lse_of(token, own_head);
    const bool is_wide = kPlain || p.target.dtype == kF32, is_brain = p.target.dtype == kBf16;
    const int a_word = wire.elements_a_word();
    const bool is_last_warp = nth == 0 && warp == warps - 1;

    dependency_wait();
    // Everything is asked for before the first of it is needed.
    const ulonglong2 state = load_words(v.window + kConsumed);
    const uint64_t noted = load_word(v.window + kStepFault);
    uint4 x[kPairs] = {};
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
        const int word = pair * 64 + lane * 2;
        const char* const from = source + word * a_word * element_bytes(is_f32 ? kF32 : kF16);
        if (!has_row || word >= words) continue;
        if (is_f32 == wire.is_f32) {
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            x[pair].x = two.x, x[pair].y = two.y;
        } else if (is_f32) {
            x[pair] = *reinterpret_cast<const uint4*>(from);
        } else {
            x[pair].x = *reinterpret_cast<const uint32_t*>(from);
        }
    }
    float2 own_lse = make_float2(-infinity(), 0.f);
    if (has_row) {
        const float* const stored = reinterpret_cast<const float*>(source_lse);
        own_lse = p.lse_in_two ? make_float2(stored[0], stored[1]) : p.source.natural_in_two(stored[0]);
        if (p.source.is_padding(token)) own_lse = make_float2(-infinity(), 0.f);
    }
    Epoch e(state.x, __shfl_sync(kAllLanes, state.y, 0));
    const uint32_t number = e.number, own_fault = pack_fault(noted, rank), own_second = second_word(own_lse, own_fault);
    // An empty partial's o goes as zeros, whatever it is.
    const bool is_empty = own_lse.x == -infinity();
    uint32_t own_data[kPairs][2];
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
        if (is_f32 && wire.is_f32) {
            own_data[pair][0] = x[pair].x, own_data[pair][1] = x[pair].y;
        } else {
            const auto two = [&](uint32_t bits) { return is_bf16 ? unpack_pair<true>(bits) : unpack_pair<false>(bits); };
            const float2 low = is_f32 ? make_float2(__uint_as_float(x[pair].x), __uint_as_float(x[pair].y)) : two(x[pair].x);
            const float2 high = is_f32 ? make_float2(__uint_as_float(x[pair].z), __uint_as_float(x[pair].w)) : two(x[pair].y);
            own_data[pair][0] = wire.is_f32 ? __float_as_uint(low.x) : wire.pack(low);
            own_data[pair][1] = wire.is_f32 ? __float_as_uint(low.y) : wire.pack(high);
        }
        if (is_empty) own_data[pair][0] = own_data[pair][1] = 0;
    }

    delay(DelayPoint::kPush, number);
    const uint64_t slot = e.parity() ? slots.y : slots.x;
    if (is_last_warp && !e.broken && is_clean_due(number)) clean_next(v, number);
    if (is_last_warp && !e.broken && lane < world) {
        store_words(reinterpret_cast<uint64_t*>(slot), packet(static_cast<uint32_t>(v.fingerprint), number),
                    packet(static_cast<uint32_t>(v.fingerprint >> 32), number));
    }
    const auto push = [&](uint64_t* to_row) {
        if (e.broken) return;
        if (lane == 0) store_words(to_row, packet(__float_as_uint(own_lse.x), number), packet(own_second, number));
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int word = pair * 64 + lane * 2;
            if (word >= words) continue;
            store_words(to_row + kRowHead + word, packet(own_data[pair][0], number), packet(own_data[pair][1], number));
        }
    };
#pragma unroll 1
    for (int n = begin; n < end; n++) push(reinterpret_cast<uint64_t*>(__shfl_sync(kAllLanes, slot, n)) + at);
    // All of the block have read the epoch, and what was noted.
    __syncthreads();
    if (is_last_warp) clear_next(v, e);
    if (threadIdx.x == 0) end_block(v);
    delay(DelayPoint::kWait, number);
    bool takes = true;
    if (!may_wait) {
        dependency_launch();
        takes = decide_at_once(v, step, e, nth);
        e.has_headers = true;
    }

    uint32_t fault = fault_of(own_lse, own_fault), data[kRanks][kPairs][2];
    float2 lse[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
        lse[r] = r == rank ? own_lse : make_float2(-infinity(), 0.f);
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            data[r][pair][0] = r == rank ? own_data[pair][0] : 0;
            data[r][pair][1] = r == rank ? own_data[pair][1] : 0;
        }
    }
    uint32_t missing = ((1u << world) - 1) & ~(1u << rank);  // ranks whose row has not come
    const uint64_t* const in = v.window + kControlWords + e.parity() * v.parity_words;
    bool done = false;
#pragma unroll 1
    for (int looks = 0; merges && takes && !e.broken && !done && looks < kEager; looks++) {
        ulonglong2 header = {};
        if (!e.has_headers && lane < world) header = load_words(in + lane * v.slot_words);
#pragma unroll
        for (int first = 0; first < kRanks; first += kGroup) {
            ulonglong2 heads[kGroup] = {}, y[kGroup][kPairs] = {};
#pragma unroll
            for (int r = 0; r < kGroup; r++) {
                if (!(missing >> (first + r) & 1)) continue;
                const uint64_t* from = in + (first + r) * v.slot_words + at;
                heads[r] = load_words(from);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    const int n = pair * 64 + lane * 2;
                    // Lanes past the last word look at the head once more.
                    y[r][pair] = load_words(n < words ? from + kRowHead + n : from);
                }
            }
#pragma unroll
            for (int r = 0; r < kGroup; r++) {
                if (!(missing >> (first + r) & 1)) continue;
                bool come = are_of(heads[r], number);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) come &= are_of(y[r][pair], number);
                if (!__all_sync(kAllLanes, come)) continue;
                missing &= ~(1u << (first + r));
                lse[first + r] = lse_of(data_of(heads[r].x), data_of(heads[r].y));
                fault = first_fault(fault, fault_of(lse[first + r], data_of(heads[r].y)));
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    data[first + r][pair][0] = data_of(y[r][pair].x), data[first + r][pair][1] = data_of(y[r][pair].y);
                }
            }
        }
        if (!e.has_headers) {
            const bool is_here = lane >= world || (are_of(header, number) && fingerprint_of(header) == v.fingerprint);
            e.has_headers = __all_sync(kAllLanes, is_here);
            // Nothing that this step waits for needs room on the GPU any more: the next launch may take it.
            if (e.has_headers) dependency_launch();
        }
        // Also before all has come, so that the instructions lie in the cache then.
        float out[kPairs][4];
        const RowScale scale = merge_words<kRanks, kPairs>(wire, lse, data, out);
        done = missing == 0 && e.has_headers;
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int word = pair * 64 + lane * 2;
            const bool is_mine = done && word < words;
            char* const element = to + word * a_word * (is_wide ? 4 : 2);
            const auto pack = [&](float a, float b) { return is_brain ? pack_pair<true>(a, b) : pack_pair<false>(a, b); };
            const uint2 bits = make_uint2(pack(out[pair][0], out[pair][1]), pack(out[pair][2], out[pair][3]));
            if (!is_mine) continue;
            if (is_wide && wire.is_f32) {
                *reinterpret_cast<float2*>(element) = make_float2(out[pair][0], out[pair][1]);
            } else if (is_wide) {
                *reinterpret_cast<float4*>(element) = make_float4(out[pair][0], out[pair][1], out[pair][2], out[pair][3]);
            } else if (wire.is_f32) {
                *reinterpret_cast<uint32_t*>(element) = bits.x;
            } else {
                *reinterpret_cast<uint2*>(element) = bits;
            }
        }
        const float merged = scale.lse() * p.target.from_natural;
        if (done && lane == 0 && to_lse != nullptr) *to_lse = merged;
    }

    // Calls come last: what is held over them would be in memory before.
    if (done && lane == 0) report_bad_data(step.view, e.parity(), fault);
    if (own_fault != 0 && threadIdx.x == 0) end_step_fault(step.view, e.parity(), own_fault, p.is_last);
    Epoch slow = e;
    const auto finish = [&](int row) {
        if (slow.broken || !write_merged<kRowsMostWords>(&step, slow, row)) poison_row(&step, row);
    };
    if (merges && !done) {
        // From here on it is a row like any other, for this warp or for others.
        push(v.window + slot_begin(v, e, rank) + at);
        if (takes) finish(row);
    }
    if (!may_wait) return;
    if (blocks > waiting) {
        const auto merge = [&](int share) {
            const int other = (blocks - 1 - share) * warps + warp;
            if (other >= p.rows) return;
            const uint32_t head = (static_cast<uint32_t>(p.first_row) + other) % static_cast<uint32_t>(v.heads);
            if (v.mode == kOneShot || owner_of_few(head, v.heads, world) == rank) finish(other);
        };
        const uint64_t decided = threadIdx.x == 0 ? decided_of(v, e.parity()) : 0;
        take_left_over(&step, e.parity(), decided, nth, waiting, blocks, merge);
    }
    // Epochs rest on it that no rank ends one before all have come.
    if (nth == 0 && warp == 0 && !slow.has_headers && !slow.broken) wait_headers(step.view, slow, 0);
    delay(DelayPoint::kConsume, e.number);
}

}  // namespace treeattn

#define TREEATTN_EXCHANGE_ROWS(NAME, RANKS, PLAIN)                                            \
    extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit) \
        treeattn_exchange_rows_##NAME(const __grid_constant__ treeattn::ExchangeParams p) {   \
        treeattn::exchange_rows<RANKS, PLAIN>(p);                                             \
    }
TREEATTN_EXCHANGE_ROWS(2_f32, 2, true)
TREEATTN_EXCHANGE_ROWS(2, 2, false)
TREEATTN_EXCHANGE_ROWS(4, 4, false)
TREEATTN_EXCHANGE_ROWS(8, 8, false)

TREEATTN_ABI(exchange_rows)
