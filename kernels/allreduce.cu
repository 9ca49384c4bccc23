// What lies between the three allreduces of the paper's merge (arXiv 2408.04093, algorithm 3): the largest lse of all
// ranks, the sum of the outputs weighed by exp(lse - largest), the sum of the weights. One warp a row (token, head).
//
//   treeattn_allreduce_begin    one block of 32 threads: says that the step waits for peers from now on, and appends the
//                               bad data that it met to the weights, which are summed
//   treeattn_allreduce_weigh    o becomes its numerator, in place
//   treeattn_allreduce_finish   the quotient is written; the row becomes the identity for the next step; the last row
//                               says that the step is over
//
// The library's own exchange does not use them: they are a baseline.
#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "steps.cuh"

namespace treeattn {

__device__ __forceinline__ float* bad_data(const AllreduceParams& p) {
    return p.weights + static_cast<int64_t>(p.tokens) * p.heads;
}

// Writes this rank's bad data as two floats, zeros for the other ranks, so that the sum over ranks has every rank's exactly. The
// first float holds the cause and the upper half of the sequence's number, the second its lower half.
__device__ __forceinline__ void begin(const AllreduceParams& p) {
    float* to = bad_data(p);
    const uint64_t word = *p.status;
    const uint32_t cause = static_cast<uint32_t>(word);
    const uint32_t sequence = 0xffffffffu - static_cast<uint32_t>(word >> 32);
    for (int i = threadIdx.x; i < p.world; i += 32) {
        const bool own = i == p.rank && cause != kFaultNone;
        to[2 * i] = own ? static_cast<float>(cause << 16 | sequence >> 16) : 0.0f;
        to[2 * i + 1] = own ? static_cast<float>(sequence & 0xffffu) : 0.0f;
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        *p.status = 0;
        count_step(p.words, p.host, kStepsBegun);
    }
}

__device__ __forceinline__ void weigh(const AllreduceParams& p, int64_t row) {
    const int lane = threadIdx.x % 32;
    const float lse = p.lse[row], most = p.most[row];
    float* o = p.o + row * p.head_dim;
    // The allreduce by maximum may drop a peer's NaN. That peer's own weight is NaN then, and so is the sum of the weights.
    const bool bad = !(most < infinity());
    double weight = exp(static_cast<double>(lse) - static_cast<double>(most));
    if (lse == -infinity()) weight = 0.0;
    if (bad) weight = not_a_number();
    for (int d = lane; d < p.head_dim; d += 32) {
        o[d] = lse == -infinity() && !bad ? 0.0f : static_cast<float>(weight * o[d]);
    }
    if (lane == 0) p.weights[row] = static_cast<float>(weight);
}

__device__ __forceinline__ void finish(const AllreduceParams& p, int64_t row) {
    const int lane = threadIdx.x % 32;
    const int64_t token = row / p.heads;
    const int head = static_cast<int>(row % p.heads) - p.first_head;
    const float most = p.most[row], sum = p.weights[row];
    const bool failed = *p.failed != 0;
    // No rank had keys. (Where a rank had a NaN, the sum is one.)
    const bool empty = most == -infinity() && sum == 0.0f;
    if (head >= 0 && head < p.own_heads) {
        char* out = p.target.row(token, head);
        for (int d = lane; d < p.head_dim; d += 32) {
            float x = empty ? 0.0f : p.o[row * p.head_dim + d] / sum;
            if (failed) x = not_a_number();
            store_element(out + d * p.target.o_stride[2], p.target.dtype, x);
        }
        if (lane == 0 && p.target.lse != nullptr) {
            float lse = empty ? most : static_cast<float>(most + log(static_cast<double>(sum)));
            if (failed) lse = not_a_number();
            *p.target.lse_of(token, head) = lse * p.target.from_natural;
        }
    }
    // A row that the next step does not write is padding.
    if (lane == 0) p.lse[row] = -infinity();
}

// Tells the host of the bad data of the lowest rank that met any, and counts the step as ended.
__device__ __forceinline__ void end(const AllreduceParams& p) {
    const float* bad = bad_data(p);
    for (int i = 0; i < p.world && *p.failed == 0; i++) {
        const uint32_t high = static_cast<uint32_t>(bad[2 * i]), low = static_cast<uint32_t>(bad[2 * i + 1]);
        if (high == 0) continue;
        const uint64_t word = pack_status((high & 0xffffu) << 16 | low, high >> 16 | static_cast<uint32_t>(i) << 8);
        *reinterpret_cast<volatile uint64_t*>(p.host + kStepBadData) = word;
        break;
    }
    count_step(p.words, p.host, kStepsEnded);
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(32)
    treeattn_allreduce_begin(const __grid_constant__ treeattn::AllreduceParams params) {
    treeattn::dependency_wait();
    treeattn::begin(params);
}

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_allreduce_weigh(const __grid_constant__ treeattn::AllreduceParams params) {
    treeattn::dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * treeattn::kRowsABlock + threadIdx.x / 32;
    if (row < static_cast<int64_t>(params.tokens) * params.heads) treeattn::weigh(params, row);
}

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_allreduce_finish(const __grid_constant__ treeattn::AllreduceParams params) {
    treeattn::dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * treeattn::kRowsABlock + threadIdx.x / 32;
    if (row < static_cast<int64_t>(params.tokens) * params.heads) treeattn::finish(params, row);
    __syncthreads();
    if (threadIdx.x == 0 && treeattn::count_arrival(params.arrived, gridDim.x - 1) == gridDim.x - 1) {
        treeattn::end(params);
    }
}

TREEATTN_ABI(allreduce)
