// How kernels count the steps that they begin and end, so that the host can watch steps of graphs, too.
#pragma once

#include "params.cuh"

namespace treeattn {

// Counts a step in device memory, and tells the host. One thread; `which` is kStepsBegun or kStepsEnded.
__device__ __forceinline__ void count_step(uint64_t* words, uint64_t* host, int which) {
    const uint64_t steps = words[which] + 1;
    words[which] = steps;
    *reinterpret_cast<volatile uint64_t*>(host + which) = steps;
}

}  // namespace treeattn
