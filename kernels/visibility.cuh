// Which of a sequence's local slots a query token sees: the only place that knows causality and windows, and which positions slots
// have. `Terms`: of a kernel that takes TermsParams; others know no window.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

// Of a kernel that takes TermsParams.
__device__ __forceinline__ const treeattn::Terms& terms_of(const DecodeParams& p) {
    return reinterpret_cast<const TermsParams&>(p).terms;
}

// Whether keys after a query token are hidden from it.
__device__ __forceinline__ bool is_causal(const DecodeParams& p) { return p.flags & kFlagCausal; }

// Whether global positions hide keys.
template <bool Terms>
__device__ __forceinline__ bool hides_by_position(const DecodeParams& p) {
    if constexpr (Terms) return is_causal(p) || terms_of(p).window > 0;
    return is_causal(p);
}

// Whether global positions matter: to what is hidden, or to scores.
template <bool Terms>
__device__ __forceinline__ bool needs_positions(const DecodeParams& p) {
    if constexpr (Terms) return hides_by_position<true>(p) || terms_of(p).slopes != nullptr;
    return is_causal(p);
}

// Whether a token's bound is a position, which the slots' own are compared with, instead of a slot.
__device__ __forceinline__ bool is_bound_by_position(const DecodeParams& p) {
    return p.placement == kExplicit && is_causal(p);
}

// The global position of a query token.
__device__ __forceinline__ int64_t position_of(const DecodeParams& p, int b, int first_token, int tokens, int token) {
    return p.query_position != nullptr ? p.query_position[first_token + token]
                                       : static_cast<int64_t>(p.global_length[b]) - tokens + token;
}

// The position of slot 0, contiguous placement.
__device__ __forceinline__ int64_t start_of(const DecodeParams& p, int b) { return p.kv_start == nullptr ? 0 : p.kv_start[b]; }

// How many of the first `length` positions a rank holds, interleaved placement.
__device__ __forceinline__ int64_t interleaved_length(const DecodeParams& p, int rank, int64_t length) {
    if (length <= 0) return 0;
    const int64_t run = p.interleave, round = run * p.world, zero = 0;
    return length / round * run + min(max(length % round - rank * run, zero), run);
}

// How many of a sequence's local slots hold positions up to `position`, for placements whose positions rise with the slot.
__device__ __forceinline__ int64_t slots_up_to(const DecodeParams& p, int b, int64_t position) {
    return p.placement == kContiguous ? position + 1 - start_of(p, b) : interleaved_length(p, p.rank, position + 1);
}

// What a query token sees: the first and the last local slot, or (explicit placement) position.
struct Visible {
    int low, high;
};
constexpr Visible kAllVisible = {INT32_MIN, INT32_MAX};

// What the query token at a position sees, in a kernel that takes TermsParams.
__device__ __forceinline__ Visible visible_to(const DecodeParams& p, int b, int64_t position) {
    const int window = terms_of(p).window;
    const int64_t zero = 0, most = INT32_MAX, before = position - window;
    Visible seen = kAllVisible;
    if (p.placement == kExplicit) {
        if (is_causal(p)) seen.high = static_cast<int>(position);
        if (window > 0) seen.low = static_cast<int>(before + 1);
    } else {
        if (is_causal(p)) seen.high = static_cast<int>(min(max(slots_up_to(p, b, position), zero), most)) - 1;
        if (window > 0) seen.low = static_cast<int>(min(max(slots_up_to(p, b, before), zero), most));
    }
    return seen;
}

// The first slot that some query token of a sequence can see, and the one after the last; x <= y. Explicit positions are in
// any order: all slots then.
struct SlotRange {
    int begin, end;
};
static __device__ __noinline__ SlotRange visible_slots(const DecodeParams& p, int b, int first_token, int tokens,
                                                       int keys) {
    if (!hides_by_position<true>(p) || p.placement == kExplicit || tokens <= 0 || keys == 0) return SlotRange{0, keys};
    int64_t first = position_of(p, b, first_token, tokens, 0), last = first + tokens - 1;
    if (p.query_position != nullptr) {
        last = first;
#pragma unroll 1
        for (int i = 1; i < tokens; i++) {
            const int64_t position = p.query_position[first_token + i];
            first = min(first, position), last = max(last, position);
        }
    }
    const int64_t zero = 0, all = keys;
    const int window = terms_of(p).window;
    int64_t begin = zero, end = all;
    if (window > 0) begin = min(max(slots_up_to(p, b, first - window), zero), all);
    if (is_causal(p)) end = min(max(slots_up_to(p, b, last), zero), all);
    return SlotRange{static_cast<int>(begin), static_cast<int>(max(begin, end))};
}

// The last local slot that query token `token` of a sequence sees, under causality; explicit placement: the last position.
static __device__ __noinline__ int causal_bound(const DecodeParams& p, int b, int first_token, int tokens, int token) {
    const int64_t position = position_of(p, b, first_token, tokens, token), zero = 0, most = INT32_MAX;
    if (p.placement == kExplicit) return static_cast<int>(position);
    return static_cast<int>(min(max(slots_up_to(p, b, position), zero), most)) - 1;
}

// The last local slot, or (explicit placement) position, that a query token sees, in a kernel without Terms.
__device__ __forceinline__ int last_visible(const DecodeParams& p, int b, int first_token, int tokens, int token) {
    return is_causal(p) ? causal_bound(p, b, first_token, tokens, token) : INT32_MAX;
}

// Asks for the small inputs that say what the first sequence's tokens see.
__device__ __forceinline__ uint32_t touch_positions(const DecodeParams& p) {
    uint32_t x = 0;
    if (is_causal(p) && p.global_length != nullptr) x ^= load_cached(p.global_length);
    if (is_causal(p) && p.kv_start != nullptr) x ^= load_cached(p.kv_start);
    return x;
}

// Whether a sequence's length has room for its query tokens, and its slots have positions that fit 31 bits. Positions that are
// given one by one are judged where they are read.
__device__ __forceinline__ bool positions_fit(const DecodeParams& p, int b, int tokens, int keys) {
    bool fit = p.query_position != nullptr || p.global_length[b] >= tokens;
    const int64_t last = keys - 1, run = p.interleave;
    if (p.placement == kContiguous) {
        const int64_t start = start_of(p, b);
        fit &= start >= 0 && start + last <= INT32_MAX;
    } else if (p.placement == kInterleaved) {
        fit &= (last / run * p.world + p.rank) * run + last % run <= INT32_MAX;
    }
    return fit;
}

}  // namespace treeattn
