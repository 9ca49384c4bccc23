// The message of a rank in a step over NCCL: a header, then a row for each (token, head).
#pragma once

#include "params.cuh"
#include "steps.cuh"

namespace treeattn {

__device__ __forceinline__ uint64_t* header_of(void* message) { return static_cast<uint64_t*>(message); }
__device__ __forceinline__ const uint64_t* header_of(const GatherParams& p, int n) {
    return reinterpret_cast<const uint64_t*>(p.received + n * p.message_bytes);
}
// A row of a message: its log-sum-exp in two floats, then, kGatherRowHead bytes behind, its o.
__device__ __forceinline__ int64_t row_at(const GatherParams& p, int64_t row) {
    return kGatherHeaderBytes + row * p.row_bytes;
}

// Says in the header which step this is, which is the same on all ranks, and counts the step as begun. One thread.
__device__ __forceinline__ void write_header(const GatherParams& p) {
    header_of(p.send)[kGatherStep] = p.fingerprint + (p.words[kStepsBegun] + 1) * 0x9e3779b97f4a7c15ull;
    count_step(p.words, p.host, kStepsBegun);
}

}  // namespace treeattn
