// One exchange of partials: every rank launches it, on the partial that its attention or its engine left in memory.
//
// No block holds back what others wait for: it pushes all its rows before it waits for any, and blocks wait for words of
// other ranks only, and for those of this rank's blocks that push before they wait. Launches that depend on this one come
// up only when the waiting is over, so that they take no room from what a peer on the same GPU has to do first.
#include "exchange.cuh"

namespace treeattn {

__device__ __forceinline__ void exchange(const ExchangeParams& p) {
    const ExchangeView& v = p.view;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    Epoch e = begin_epoch(v);
    if (!e.broken) {
        delay(Point::kPush, e.number);
        if (warp == 0) push_header(v, e);
        if (p.o != nullptr) {
            const uint32_t fault = pack_fault(load_word(v.window + kFault), v.rank);
            for (int64_t row = warp; row < p.rows; row += warps) push_row(p, e, row, fault);
        }
        delay(Point::kWait, e.number);
        wait_headers(v, e);
    }
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
    delay(Point::kConsume, e.number);
    __syncthreads();
    dependency_launch();
    if (threadIdx.x == 0) {
        auto* arrived = reinterpret_cast<uint32_t*>(v.window + kArrived);
        if (count_arrival(arrived, gridDim.x - 1) == gridDim.x - 1) {
            // Every block has read what came.
            store_word(v.window + kFault, 0);
            if (load_word(v.window + kFailed) == 0) store_word(v.window + kConsumed, e.number);
        }
    }
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(256, 1)
    treeattn_exchange(const __grid_constant__ treeattn::ExchangeParams params) {
    treeattn::dependency_wait();
    treeattn::exchange(params);
}

#ifdef TREEATTN_DELAYS
extern "C" __device__ uint32_t treeattn_delays[4] = {};
#endif
