// The exchange within a node, of a step whose ranks are of several nodes: every rank of the node pushes its partial into the
// windows of the others, merges all, and leaves what they merge to in its message for the ranks of other nodes (gather.cu).
//
// An exchange like any other, in the windows of the node. All blocks of a launch wait for ranks, after all of their pushes.
#include "gathered.cuh"
#include "merge_large.cuh"
#include "steps.cuh"

namespace treeattn {

struct NodeState {
    SlotTable slots;
    MergeStep step;
};

// One warp pushes a row of this rank's partial to all ranks of the node. An empty partial's o goes as zeros.
__device__ __forceinline__ void push_row(const NodeParams& p, const Epoch& e, const SlotTable& slots, int64_t row,
                                         uint32_t fault) {
    const ExchangeView& v = p.view;
    const RowSource& source = p.gather.source;
    const int lane = threadIdx.x % 32, words = static_cast<int>(row_words(source.dim, kF32)) - kRowHead;
    const int64_t flat = p.first_row + row, token = token_of(flat, v.heads), head = flat - token * v.heads;
    const char* o = source.row(token, head);
    const float* stored = reinterpret_cast<const float*>(source.lse_of(token, head));
    const float2 lse = p.gather.lse_in_two ? make_float2(stored[0], stored[1]) : source.natural_in_two(stored[0]);
    const uint32_t mask = lse.x == -infinity() ? 0 : 0xffffffffu;
    const int64_t at = kHeaderWords + row * (words + kRowHead), stride = source.o_stride[2];
    for (int n = 0; n < v.world && lane == 0; n++) {
        store_words(slots.at(e.number, n) + at, packet(__float_as_uint(lse.x), e.number),
                    packet(second_word(lse, fault), e.number));
    }
    for (int d = lane * 2; d < words; d += 64) {
        const float2 x = load_two(o + d * stride, stride, source.dtype, source.dim - d);
        for (int n = 0; n < v.world; n++) {
            store_words(slots.at(e.number, n) + at + kRowHead + d, packet(__float_as_uint(x.x) & mask, e.number),
                        packet(__float_as_uint(x.y) & mask, e.number));
        }
    }
}

// One warp merges a row of all ranks of the node into the message. NaN where the communicator is broken.
__device__ __forceinline__ void merge_into_message(const NodeParams& p, const MergeStep& m, Epoch& e, int64_t row) {
    const Wire wire(p.gather.wire_dtype);
    char* const to = p.gather.send + row_at(p.gather, p.first_row + row);
    char* const o = to + kGatherRowHead;
    const auto take = [&](int n, float2 a, float2 b) {
        if (wire.is_f32) {
            *reinterpret_cast<float2*>(o + n * 4) = make_float2(a.x, b.x);
        } else {
            *reinterpret_cast<uint32_t*>(o + n * 2) = wire.pack(make_float2(a.x, b.x));
        }
    };
    const auto end = [&](const RowScale& scale, uint32_t fault) {
        if (threadIdx.x % 32 != 0) return;
        *reinterpret_cast<float2*>(to) = scale.lse_in_two();
        if (fault == 0) return;
        const uint32_t rank = p.members[fault >> 5 & 63];
        atomicMax(reinterpret_cast<unsigned long long*>(p.found),
                  static_cast<unsigned long long>(pack_status((fault >> 11) - 1, fault & 31, rank)));
    };
    if (e.broken || !merge_row(m, e, row, take, end)) {
        if (threadIdx.x % 32 == 0) *reinterpret_cast<float2*>(to) = make_float2(not_a_number(), 0.f);
    }
}

// What follows the last launch of a step: the message's header. One thread of the last block.
__device__ __forceinline__ void finish_message(const NodeParams& p) {
    uint64_t* header = header_of(p.gather.send);
    const uint64_t failed = load_word(p.view.window + kFailed);
    const uint32_t rank = static_cast<uint32_t>(failed) >> kRankShift;
    header[kGatherBadData] = *p.found;
    header[kGatherFailure] = failed == 0 ? 0 : (failed & 0xff) | static_cast<uint64_t>(p.members[rank]) << kRankShift;
    *p.found = 0;
    *p.status = 0;
    write_header(p.gather);
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit)
    treeattn_nodes(const __grid_constant__ treeattn::NodeParams p) {
    using namespace treeattn;
    __shared__ NodeState s;
    const ExchangeView& v = p.view;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * warps + warp, step = static_cast<int64_t>(gridDim.x) * warps;
    if (threadIdx.x < v.world) {
        const ulonglong2 slots = *reinterpret_cast<const ulonglong2*>(v.slots + threadIdx.x * kSlots);
        s.slots.addresses[threadIdx.x][0] = slots.x, s.slots.addresses[threadIdx.x][1] = slots.y;
    }
    if (threadIdx.x == 64) {
        s.step.view = v;
        s.step.target = p.gather.target;
        s.step.first_row = p.first_row, s.step.rows = p.rows;
    }
    __syncthreads();
    dependency_wait();

    Epoch e = begin_epoch(v);
    if (blockIdx.x == gridDim.x - 1 && warp == warps - 1) push_header(v, e, s.slots);
    delay(DelayPoint::kPush, e.number);
    const uint32_t fault = pack_fault(*p.status, v.rank);
    for (int64_t row = first; row < p.rows && !e.broken; row += step) push_row(p, e, s.slots, row, fault);
    // All of the block have read the epoch.
    __syncthreads();
    if (threadIdx.x == 0) end_block(v);
    delay(DelayPoint::kWait, e.number);
    wait_headers(v, e, 0);
    for (int64_t row = first; row < p.rows; row += step) merge_into_message(p, s.step, e, row);
    delay(DelayPoint::kConsume, e.number);
    __threadfence();
    __syncthreads();
    const uint32_t others = gridDim.x - 1;
    if (threadIdx.x == 0 && count_arrival(p.arrived, others) == others && p.is_last) finish_message(p);
}

TREEATTN_GATHER_ABI(nodes)
