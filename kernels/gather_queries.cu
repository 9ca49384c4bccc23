// The queries of steps over NCCL whose ranks have those of their own heads: before and after an allgather of their own.
//
//   treeattn_send_queries   before it: this rank's queries, [token, own head, dim], to its message; says that the step waits for
//                           peers from now on
//   treeattn_take_queries   after it: those of all ranks to where the step reads them, [token, head, dim]; the last block tells the
//                           host that this is over
//
// To who watches steps this is a step of its own, and the one that attends is the next. `source` is where the queries lie, `target`
// where all of them go; a message has as many rows as the rank with the most heads, without a header: that of the partials tells
// ranks that are out of step.
#include "gathered.cuh"
#include "ll.cuh"
#include "numbers.cuh"
#include "query_rows.cuh"

namespace treeattn {

// The heads of a rank.
struct RankHeads {
    int first, count;

    __device__ __forceinline__ RankHeads(const GatherParams& p, int rank) {
        first = first_head_of(rank, p.heads, p.world);
        count = first_head_of(rank + 1, p.heads, p.world) - first;
    }
};

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_send_queries(const __grid_constant__ treeattn::GatherParams p) {
    using namespace treeattn;
    dependency_wait();
    if (blockIdx.x == 0 && threadIdx.x == 0) count_step(p.words, p.host, kStepsBegun);
    const QueryRows q(p.source.o, p.source.o_stride, element_bytes(p.source.dtype));
    const RankHeads own(p, p.rank);
    const int words = static_cast<int>(p.row_bytes / 8);
    const int64_t all = static_cast<int64_t>(p.tokens) * own.count * words;
#pragma unroll 1
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < all; i += gridDim.x * static_cast<int64_t>(blockDim.x)) {
        const int64_t row = i / words, token = row / own.count;
        reinterpret_cast<uint64_t*>(p.send)[i] = q.load(token, row - token * own.count, static_cast<int>(i - row * words));
    }
}

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_take_queries(const __grid_constant__ treeattn::GatherParams p) {
    using namespace treeattn;
    dependency_wait();
    const int words = static_cast<int>(p.row_bytes / 8);
    const int64_t all = static_cast<int64_t>(p.tokens) * p.heads * words;
#pragma unroll 1
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < all; i += gridDim.x * static_cast<int64_t>(blockDim.x)) {
        const int64_t row = i / words, token = row / p.heads;
        const int head = static_cast<int>(row - token * p.heads), rank = owner_of(head, p.heads, p.world);
        const RankHeads theirs(p, rank);
        const int64_t from = (token * theirs.count + head - theirs.first) * words + i - row * words;
        const uint64_t* message = reinterpret_cast<const uint64_t*>(p.received + rank * p.message_bytes);
        static_cast<uint64_t*>(p.target.o)[i] = message[from];
    }
    __syncthreads();
    if (threadIdx.x == 0 && count_arrival(p.arrived, gridDim.x - 1) == gridDim.x - 1) count_step(p.words, p.host, kStepsEnded);
}

TREEATTN_GATHER_ABI(gather_queries)
