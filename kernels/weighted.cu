// The exchange of steps with weighted output: log-sum-exps alone go round, and every rank scales its own partial, so that the
// outputs of all ranks add up to the merged one.
//
// It is an exchange like any other, of rows that have a head and no o. All its blocks wait for ranks, so there are no more of them
// than may.
#include "exchange.cuh"

namespace treeattn {

constexpr int kLaneRanks = kMaxRanks / 32;  // ranks that a lane has
static_assert(kMaxRanks % 32 == 0, "as many of each lane");

// The log-sum-exps of all ranks of a row, as a warp has them: lane l has those of ranks l, l + 32, ...
struct RankLses {
    float2 lse[kLaneRanks];
    uint32_t fault;  // bad data of the first sequence that some rank has met

    __device__ __forceinline__ float2 of(int rank) const {
        const float2 mine = rank < 32 ? lse[0] : lse[1];
        return make_float2(__shfl_sync(kAllLanes, mine.x, rank % 32), __shfl_sync(kAllLanes, mine.y, rank % 32));
    }
    // In rank order, as merges of whole rows go.
    __device__ __forceinline__ RowScale scale(int world) const {
        RowScale s{{-infinity(), 0.f}, false, {0.f, 0.f}, 0.f, 0.f};
#pragma unroll 1
        for (int rank = 0; rank < world; rank++) {
            const float2 x = of(rank);
            if (x.x > s.top.x) s.top = x;
            s.bad |= !(x.x < infinity());
        }
#pragma unroll 1
        for (int rank = 0; rank < world; rank++) s.sum.add(s.weight(of(rank)));
        s.invert();
        return s;
    }
};
static_assert(kLaneRanks == 2, "RankLses::of");

// Where a row's words lie in a slot.
__device__ __forceinline__ int64_t lse_at(int64_t row) { return kHeaderWords + row * kRowHead; }

// One warp pushes this rank's log-sum-exp of a row to all ranks, the own one too.
__device__ __forceinline__ void push_lse(const ExchangeParams& p, const Epoch& e, const SlotTable& slots, int64_t row,
                                         uint32_t fault) {
    const ExchangeView& v = p.view;
    const int64_t flat = p.first_row + row, token = token_of(flat, v.heads), head = flat - token * v.heads;
    const float2 lse = p.source.lse_of_row(token, head, p.lse_in_two, p.source.divisor(token, head));
    for (int n = threadIdx.x % 32; n < v.world; n += 32) {
        store_words(slots.at(e.number, n) + lse_at(row), packet(__float_as_uint(lse.x), e.number),
                    packet(second_word(lse, fault), e.number));
    }
}

// One warp waits for the log-sum-exps of a row. False: the communicator is broken.
__device__ __forceinline__ bool wait_lses(const ExchangeView& v, Epoch& e, int64_t row, RankLses& all) {
    const int lane = threadIdx.x % 32;
    uint32_t fault = 0;
#pragma unroll
    for (int nth = 0; nth < kLaneRanks; nth++) {
        const int rank = nth * 32 + lane;
        all.lse[nth] = make_float2(-infinity(), 0.f);
        if (nth * 32 >= v.world) continue;
        const uint64_t* from = slot_of(v, e, min(rank, v.world - 1)) + lse_at(row);
        ulonglong2 words;
        for (int spins = 1;; spins++) {
            words = load_words(from);
            const bool come = are_of(words, e.number);
            if (__all_sync(kAllLanes, come)) break;
            if (spins % kSpins == 0) {
                if (give_up(v, e, lowest(come, min(rank, v.world - 1)))) return false;
            } else if (spins > kSpins) {
                __nanosleep(kSleep);
            }
        }
        if (rank >= v.world) continue;
        all.lse[nth] = lse_of(data_of(words.x), data_of(words.y));
        fault = first_fault(fault, fault_of(all.lse[nth], data_of(words.y)));
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) fault = first_fault(fault, __shfl_xor_sync(kAllLanes, fault, d));
    all.fault = fault;
    return true;
}

// One warp writes this rank's part of a row: NaN where the row is bad, zeros where the own partial is empty.
__device__ __forceinline__ void write_part(const ExchangeParams& p, int64_t row, const RankLses& all) {
    const ExchangeView& v = p.view;
    const RowSource& source = p.source;
    const RowTarget& target = p.target;
    const int64_t flat = p.first_row + row, token = token_of(flat, v.heads), head = flat - token * v.heads;
    const RowScale scale = all.scale(v.world);
    const float2 own = all.of(v.rank);
    const bool is_zero = own.x == -infinity() && !scale.bad;
    const float share = scale.bad ? not_a_number() : scale.share(scale.weight(own));
    const float sum = source.divisor(token, head);
    const char* o = source.row(token, head);
    char* out = target.row(token, head);
    const int64_t from_stride = source.o_stride[2], to_stride = target.o_stride[2];
    for (int d = threadIdx.x % 32 * 2; d < target.dim; d += 64) {
        float2 x = load_two(o + d * from_stride, from_stride, source.dtype, source.dim - d);
        if (source.sum != nullptr) x = make_float2(x.x / sum, x.y / sum);
        x = is_zero ? make_float2(0.f, 0.f) : make_float2(share * x.x, share * x.y);
        if (d + 1 < target.dim) {
            store_two(out + d * to_stride, to_stride, target.dtype, x);
        } else {
            store_element(out + d * to_stride, target.dtype, x.x);
        }
    }
    if (threadIdx.x % 32 == 0 && target.lse != nullptr) *target.lse_of(token, head) = scale.lse() * target.from_natural;
}

// One warp writes NaN.
__device__ __forceinline__ void write_bad_row(const ExchangeParams& p, int64_t row) {
    const RowTarget& target = p.target;
    const int64_t flat = p.first_row + row, token = token_of(flat, p.view.heads), head = flat - token * p.view.heads;
    for (int d = threadIdx.x % 32; d < target.dim; d += 32) {
        store_element(target.row(token, head) + d * target.o_stride[2], target.dtype, not_a_number());
    }
    if (threadIdx.x % 32 == 0 && target.lse != nullptr) *target.lse_of(token, head) = not_a_number();
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit)
    treeattn_weighted(const __grid_constant__ treeattn::ExchangeParams p) {
    using namespace treeattn;
    __shared__ SlotTable slots;
    const ExchangeView& v = p.view;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * warps + warp, step = static_cast<int64_t>(gridDim.x) * warps;
    if (threadIdx.x < v.world) {
        const ulonglong2 own = *reinterpret_cast<const ulonglong2*>(v.slots + threadIdx.x * kSlots);
        slots.addresses[threadIdx.x][0] = own.x, slots.addresses[threadIdx.x][1] = own.y;
    }
    dependency_wait();
    Epoch e = begin_epoch(v);
    const uint32_t fault = pack_fault(load_word(v.window + kStepFault), v.rank);
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1 && warp == warps - 1) push_header(v, e, slots);
    delay(DelayPoint::kPush, e.number);
#pragma unroll 1
    for (int64_t row = first; row < p.rows && !e.broken; row += step) push_lse(p, e, slots, row, fault);
    // All of the block have read the epoch, and what was noted.
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fault != 0) end_step_fault(v, e.parity(), fault, p.is_last);
        end_block(v);
    }
    delay(DelayPoint::kWait, e.number);
    if (!e.broken && wait_headers(v, e, 0) && warp == 0) dependency_launch();
#pragma unroll 1
    for (int64_t row = first; row < p.rows; row += step) {
        RankLses all;
        if (e.broken || !wait_lses(v, e, row, all)) {
            write_bad_row(p, row);
            continue;
        }
        write_part(p, row, all);
        if (threadIdx.x % 32 == 0) report_bad_data(v, e.parity(), all.fault);
    }
    delay(DelayPoint::kConsume, e.number);
}

TREEATTN_ABI(weighted)
