// What lies around the one NCCL allgather of a step whose partials go over NCCL: a rank's message, and the merge of all ranks'.
//
//   treeattn_gather_begin   before the allgather: writes the message's header and says that the step waits for peers from now on;
//                           with a source, one warp a row: copies the partial into the message
//   treeattn_gather_merge   after it, one warp a row (token, head): merges what all ranks sent, in rank order; the last block tells
//                           the host what went wrong, and that the step is over
//
// Ranks of several nodes send what their nodes have merged (nodes.cu), several ranks of a node perhaps: of each node one message
// is merged. Weights and sums are those of merge_step.cuh, so that a merge over NCCL makes the same bits as one over windows.
#include "gathered.cuh"
#include "merge_step.cuh"
#include "numbers.cuh"
#include "odd_rank.cuh"

namespace treeattn {

// Four neighbouring elements of a row as they go on the wire. A row begins at a multiple of 16 bytes.
__device__ __forceinline__ void store_four(char* row, int d, const Wire& wire, float4 x) {
    if (wire.is_f32) {
        *reinterpret_cast<float4*>(row + d * 4) = x;
    } else {
        const uint2 bits = make_uint2(wire.pack(make_float2(x.x, x.y)), wire.pack(make_float2(x.z, x.w)));
        *reinterpret_cast<uint2*>(row + d * 2) = bits;
    }
}
__device__ __forceinline__ float4 load_four(const char* row, int d, const Wire& wire) {
    if (wire.is_f32) return *reinterpret_cast<const float4*>(row + d * 4);
    const uint2 bits = *reinterpret_cast<const uint2*>(row + d * 2);
    const float2 low = wire.unpack(bits.x), high = wire.unpack(bits.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// Copies a row of the source into the message. An empty partial's o goes as zeros, whatever it is.
__device__ __forceinline__ void take_row(const GatherParams& p, int64_t row) {
    const RowSource& source = p.source;
    const Wire wire(p.wire_dtype);
    const int64_t token = token_of(row, p.heads), head = row - token * p.heads, stride = source.o_stride[2];
    const char* o = source.row(token, head);
    const float sum = source.divisor(token, head);
    const float2 lse = source.lse_of_row(token, head, p.lse_in_two, sum);
    char* to = p.send + row_at(p, row);
    if (threadIdx.x % 32 == 0) *reinterpret_cast<float2*>(to) = lse;
    for (int d = threadIdx.x % 32 * 4; d < source.dim; d += 128) {
        float2 low = load_two(o + d * stride, stride, source.dtype, source.dim - d);
        float2 high = load_two(o + (d + 2) * stride, stride, source.dtype, source.dim - d - 2);
        if (source.sum != nullptr) low = make_float2(low.x / sum, low.y / sum), high = make_float2(high.x / sum, high.y / sum);
        float4 x = make_float4(low.x, low.y, high.x, high.y);
        if (lse.x == -infinity()) x = make_float4(0.f, 0.f, 0.f, 0.f);
        store_four(to + kGatherRowHead, d, wire, x);
    }
}

// The message of partial n.
__device__ __forceinline__ int message_of(const GatherParams& p, int n) { return p.merged == nullptr ? n : p.merged[n]; }
// The rank that sent message n.
__device__ __forceinline__ uint32_t sender_of(const GatherParams& p, int n) {
    return p.senders == nullptr ? n : p.senders[n];
}

// One warp's view of a row of all messages that are merged.
struct GatheredRow {
    const GatherParams& p;
    const char* from;  // the row in the first message
    int lane;

    __device__ __forceinline__ GatheredRow(const GatherParams& params, int64_t row)
        : p(params), from(params.received + row_at(params, row)), lane(threadIdx.x % 32) {}

    // The log-sum-exp of partial first + lane; empty where there is none.
    __device__ __forceinline__ float2 lse(int first) const {
        const int n = first + lane;
        if (n >= p.partials) return make_float2(-infinity(), 0.f);
        return *reinterpret_cast<const float2*>(from + message_of(p, n) * p.message_bytes);
    }
    __device__ __forceinline__ RowScale scale() const {
        RowScale s{{-infinity(), 0.f}, false, {0.f, 0.f}, 0.f, 0.f};
        for (int first = 0; first < p.partials; first += 32) {
            const float2 mine = lse(first);
            s.bad |= __any_sync(kAllLanes, !(mine.x < infinity()));
            float most = mine.x;
#pragma unroll
            for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
            // Of equal ones that of the lowest rank.
            const int lowest = __ffs(__ballot_sync(kAllLanes, mine.x == most)) - 1;
            const float rest = __shfl_sync(kAllLanes, mine.y, max(lowest, 0));
            if (most > s.top.x) s.top = make_float2(most, rest);
        }
        for (int first = 0; first < p.partials; first += 32) {
            const float weight = s.weight(lse(first));
            for (int n = 0; n < min(p.partials - first, 32); n++) s.sum.add(__shfl_sync(kAllLanes, weight, n));
        }
        s.invert();
        return s;
    }
    // Merged elements d to d + 3.
    __device__ __forceinline__ float4 elements(const RowScale& s, const Wire& wire, int d) const {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int first = 0; first < p.partials; first += 32) {
            const float2 mine = lse(first);
            const float share = s.share(s.weight(mine));
#pragma unroll 4
            for (int n = 0; n < min(p.partials - first, 32); n++) {
                const float weight = __shfl_sync(kAllLanes, share, n);
                const bool is_empty = __shfl_sync(kAllLanes, mine.x, n) == -infinity();
                float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
                const char* row = from + message_of(p, first + n) * p.message_bytes + kGatherRowHead;
                if (!is_empty && d < p.target.dim) x = load_four(row, d, wire);
                sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
                sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
            }
        }
        return sum;
    }
};

// Whether the step failed, or ranks sent of different steps: its rows are NaN then. By whole warps.
__device__ __forceinline__ bool is_lost(const GatherParams& p) {
    bool is_bad = false;
    for (int n = threadIdx.x % 32; n < p.world; n += 32) {
        const uint64_t* header = header_of(p, n);
        is_bad |= header[kGatherStep] != header_of(p.send)[kGatherStep] || header[kGatherFailure] != 0;
    }
    return __any_sync(kAllLanes, is_bad) || *p.failed != 0;
}

__device__ __forceinline__ void merge_row(const GatherParams& p, int64_t row) {
    const int64_t token = token_of(row, p.heads), head = row - token * p.heads - p.first_head;
    if (head < 0 || head >= p.own_heads) return;
    const bool lost = is_lost(p);
    const int lane = threadIdx.x % 32;
    const RowTarget& target = p.target;
    const Wire wire(p.wire_dtype);
    const GatheredRow gathered(p, row);
    const RowScale scale = gathered.scale();
    char* out = target.row(token, head);
    for (int first = 0; first < target.dim; first += 128) {
        const int d = first + lane * 4;
        const float4 x = gathered.elements(scale, wire, d);
        const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 two = lost ? make_float2(not_a_number(), not_a_number()) : make_float2(values[i], values[i + 1]);
            char* at = out + (d + i) * target.o_stride[2];
            if (d + i + 1 < target.dim) {
                store_two(at, target.o_stride[2], target.dtype, two);
            } else if (d + i < target.dim) {
                store_element(at, target.dtype, two.x);
            }
        }
    }
    if (lane == 0 && target.lse != nullptr) {
        *target.lse_of(token, head) = lost ? not_a_number() : scale.lse() * target.from_natural;
    }
}

// The bad data of the first sequence that any rank has met, with the lowest rank that met it; 0 for none.
__device__ __forceinline__ uint64_t first_bad_data(const GatherParams& p) {
    uint64_t first = 0;
    for (int n = 0; n < p.world; n++) {
        const uint64_t word = header_of(p, n)[kGatherBadData];
        // What nodes have merged says which rank it was.
        const uint64_t rank = p.senders == nullptr ? static_cast<uint64_t>(n) << kRankShift : 0;
        if (word >> kHighShift > first >> kHighShift) first = word | rank;
    }
    return first;
}

// Ends the step, and fails all later ones where a node failed, or ranks were in different steps. One thread of the last block.
__device__ __forceinline__ void end_step(const GatherParams& p) {
    uint64_t* header = header_of(p.send);
    const auto step_of = [&](int n) { return header_of(p, n)[kGatherStep]; };
    bool same = true;
    uint64_t failure = 0;
    for (int n = 0; n < p.world; n++) {
        same &= step_of(n) == header[kGatherStep];
        if (failure == 0) failure = header_of(p, n)[kGatherFailure];
    }
    if (failure == 0 && !same) failure = kDesync | sender_of(p, odd_rank(p.world, p.rank, step_of)) << kRankShift;
    if (*p.failed == 0 && failure != 0) {
        *reinterpret_cast<volatile uint64_t*>(p.failure) = failure;
        *p.failed = 1;
    } else if (*p.failed == 0) {
        const uint64_t word = first_bad_data(p);
        if (word != 0) *reinterpret_cast<volatile uint64_t*>(p.host + kStepBadData) = word;
    }
    header[kGatherBadData] = 0;
    __threadfence_system();
    count_step(p.words, p.host, kStepsEnded);
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_gather_begin(const __grid_constant__ treeattn::GatherParams p) {
    treeattn::dependency_wait();
    treeattn::dependency_launch();
    if (blockIdx.x == 0 && threadIdx.x == 0) treeattn::write_header(p);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * treeattn::kRowsABlock + threadIdx.x / 32;
    if (p.source.o != nullptr && row < static_cast<int64_t>(p.tokens) * p.heads) treeattn::take_row(p, row);
}

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_gather_merge(const __grid_constant__ treeattn::GatherParams p) {
    treeattn::dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * treeattn::kRowsABlock + threadIdx.x / 32;
    if (row < static_cast<int64_t>(p.tokens) * p.heads) treeattn::merge_row(p, row);
    __syncthreads();
    if (threadIdx.x == 0 && treeattn::count_arrival(p.arrived, gridDim.x - 1) == gridDim.x - 1) treeattn::end_step(p);
}

TREEATTN_GATHER_ABI(gather)
