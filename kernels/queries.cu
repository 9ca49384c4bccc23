// The gather of queries, before a step of ranks that were passed those of their own heads only: every rank pushes its own to
// all others and waits for theirs, so that the step finds those of all heads in memory.
//
// It is an exchange like any other, with an epoch of its own in the slots of the windows. Queries travel as the bits they
// are, and a rank that has no keys sends its own like all others. Where the communicator is broken nothing is sent or waited
// for: the step sees that as well, and writes NaN.
#include "merge_step.cuh"
#include "query_rows.cuh"

namespace treeattn {

// The heads of a rank, and its rows of a launch: token * heads + head, from the launch's first on.
struct RankRows {
    int first_head, heads, count;

    __device__ __forceinline__ RankRows(const QueryParams& p, int rank) {
        const ExchangeView& v = p.view;
        first_head = first_head_of(rank, v.heads, v.world);
        heads = first_head_of(rank + 1, v.heads, v.world) - first_head;
        const int64_t left = static_cast<int64_t>(p.tokens) * heads - p.first_row;
        count = static_cast<int>(max(min(left, static_cast<int64_t>(p.rows)), static_cast<int64_t>(0)));
    }
};

// One of them: a rank's head of a token. Only of ranks that have rows.
struct RankRow {
    int64_t token;
    int head;

    __device__ __forceinline__ RankRow(const QueryParams& p, const RankRows& rows, int row) {
        const int64_t flat = p.first_row + row;
        token = token_of(flat, rows.heads);
        head = static_cast<int>(flat - token * rows.heads);
    }
    // Where it goes, eight bytes at a time.
    __device__ __forceinline__ uint64_t* gathered(const QueryParams& p, const RankRows& rows) const {
        const int64_t at = (token * p.view.heads + rows.first_head + head) * p.words;
        return reinterpret_cast<uint64_t*>(p.gathered + at * static_cast<int64_t>(sizeof(uint32_t)));
    }
};

// Pushes this rank's rows to all others, and puts them where its own step finds them. Called by all threads of the grid.
__device__ __forceinline__ void push_queries(const QueryParams& p, const Epoch& e, const SlotTable& slots) {
    const QueryRows q(p.q, p.q_stride, p.element_bytes);
    const RankRows own(p, p.view.rank);
    const int pairs = p.words / 2;
#pragma unroll 1
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < own.count * pairs; i += gridDim.x * blockDim.x) {
        const int row = i / pairs, pair = i - row * pairs;
        const RankRow place(p, own, row);
        const uint64_t x = q.load(place.token, place.head, pair);
        const uint64_t low = packet(static_cast<uint32_t>(x), e.number);
        const uint64_t high = packet(static_cast<uint32_t>(x >> 32), e.number);
#pragma unroll 1
        for (int n = 0; n < p.view.world - 1; n++) {
            store_words(slots.at(e.number, n) + kHeaderWords + static_cast<int64_t>(row) * p.words + 2 * pair, low, high);
        }
        place.gathered(p, own)[pair] = x;
    }
}

// Waits for the rows of the other ranks, and puts them where the step finds them. Called by all warps of the grid.
__device__ __forceinline__ void take_queries(const QueryParams& p, Epoch& e) {
    const ExchangeView& v = p.view;
    const int lane = threadIdx.x % 32, pairs = p.words / 2, each = p.rows * pairs, total = (v.world - 1) * each;
#pragma unroll 1
    for (int first = (blockIdx.x * blockDim.x + threadIdx.x) - lane; first < total; first += gridDim.x * blockDim.x) {
        const int i = min(first + lane, total - 1), nth = i / each, row = (i - nth * each) / pairs;
        const int pair = i - nth * each - row * pairs, rank = nth + (nth >= v.rank);
        const RankRows theirs(p, rank);
        const bool has_row = first + lane < total && row < theirs.count;
        const uint64_t* from = slot_of(v, e, rank) + kHeaderWords + static_cast<int64_t>(row) * p.words + 2 * pair;
        ulonglong2 words = {};
        for (int spins = 1;; spins++) {
            if (has_row) words = load_words(from);
            const bool come = !has_row || are_of(words, e.number);
            if (__all_sync(kAllLanes, come)) break;
            if (spins % kSpins == 0) {
                if (give_up(v, e, lowest(come, rank))) return;
            } else if (spins > kSpins) {
                __nanosleep(kSleep);
            }
        }
        if (!has_row) continue;
        const uint64_t x = static_cast<uint64_t>(data_of(words.y)) << 32 | data_of(words.x);
        RankRow(p, theirs, row).gathered(p, theirs)[pair] = x;
    }
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit)
    treeattn_gather_queries(const __grid_constant__ treeattn::QueryParams p) {
    using namespace treeattn;
    __shared__ SlotTable slots;
    const ExchangeView& v = p.view;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x < v.world) {
        const ulonglong2 own = *reinterpret_cast<const ulonglong2*>(v.slots + threadIdx.x * kSlots);
        slots.addresses[threadIdx.x][0] = own.x, slots.addresses[threadIdx.x][1] = own.y;
    }
    dependency_wait();
    Epoch e = begin_epoch(v);
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1 && warp == warps - 1) push_header(v, e, slots);
    delay(DelayPoint::kPush, e.number);
    if (!e.broken) push_queries(p, e, slots);
    // Every warp of the block has read the epoch, and no block waits while it still owes a push.
    __syncthreads();
    if (threadIdx.x == 0) end_block(v);
    delay(DelayPoint::kWait, e.number);
    if (e.broken || !wait_headers(v, e, 0)) return;
    // Every rank's kernel runs by then, or has run. What this one still waits for needs no free multiprocessor, so that
    // dependent launches may start.
    if (warp == 0) dependency_launch();
    take_queries(p, e);
    delay(DelayPoint::kConsume, e.number);
}

TREEATTN_QUERY_ABI(queries)
