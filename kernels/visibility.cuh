// Which of a sequence's local slots a query token sees: the only place that knows causality, and which positions slots have.
#pragma once

#include "params.cuh"

namespace treeattn {

// Whether keys after a query token are hidden from it.
__device__ __forceinline__ bool is_causal(const DecodeParams& p) { return p.flags & kFlagCausal; }

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

// The last local slot that query token `token` of a sequence sees, under causality; explicit placement: the last position.
static __device__ __noinline__ int causal_bound(const DecodeParams& p, int b, int first_token, int tokens, int token) {
    const int64_t position = position_of(p, b, first_token, tokens, token), zero = 0, most = INT32_MAX;
    if (p.placement == kExplicit) return static_cast<int>(position);
    return static_cast<int>(min(max(slots_up_to(p, b, position), zero), most)) - 1;
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
