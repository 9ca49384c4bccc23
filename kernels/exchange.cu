// One exchange of partials: every rank launches it, on the partial that its attention or its engine left in memory; or
// after a decode kernel that has pushed its rows itself.
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
    if (!e.broken && !p.is_pushed) {
        delay(DelayPoint::kPush, e.number);
        if (warp == 0) push_header(v, e);
        if (p.source.o != nullptr) {
            const uint32_t fault = pack_fault(load_word(v.window + kFault), v.rank);
            for (int64_t row = warp; row < p.rows; row += warps) push_row(p, e, row, fault);
        }
    }
    receive(p, e, warp, warps);
    __syncthreads();
    dependency_launch();
    if (threadIdx.x == 0) consume(v, e, gridDim.x, p.is_last);
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(256, 2)
    treeattn_exchange(const __grid_constant__ treeattn::ExchangeParams params) {
    treeattn::dependency_wait();
    treeattn::exchange(params);
}

TREEATTN_ABI(exchange)
