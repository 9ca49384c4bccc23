// One exchange of partials: every rank launches it, on the partial that its attention or its engine left in memory; or
// after a decode kernel that has pushed its rows itself.
//
// No block holds back what others wait for: it pushes all its rows before it waits for any.
#include "exchange.cuh"

namespace treeattn {

// What a block keeps in shared memory.
struct ExchangeState {
    SlotTable slots;
    MergeStep step;
};

// Words of a row in memory, as they go on the wire: those of a pass that begins with word `first` of o, two at a time a lane.
struct SourceWords {
    uint32_t data[kPairs][2];

    // Divides them by `sum` where there is one.
    __device__ __forceinline__ void load(const RowSource& source, const char* o, const Wire& wire, int first, float sum) {
        const int64_t stride = source.o_stride[2];
        const int size = wire.elements_a_word();
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int d = (first + pair * 64 + threadIdx.x % 32 * 2) * size;
            // A word is one element or two; both words of a lane are neighbours.
            float2 low = load_two(o + d * stride, stride, source.dtype, source.dim - d);
            if (source.sum != nullptr) low = make_float2(low.x / sum, low.y / sum);
            if (wire.is_f32) {
                data[pair][0] = __float_as_uint(low.x), data[pair][1] = __float_as_uint(low.y);
            } else {
                float2 high = load_two(o + (d + 2) * stride, stride, source.dtype, source.dim - d - 2);
                if (source.sum != nullptr) high = make_float2(high.x / sum, high.y / sum);
                data[pair][0] = wire.pack(low), data[pair][1] = wire.pack(high);
            }
        }
    }
};

// A row of this rank's partial, as one warp has it: where it lies, then the first pass of its words.
struct PartialRow {
    const char* o;
    int64_t token;
    int head;
    float2 lse;
    float sum;  // by which o is still to be divided
    SourceWords words;

    __device__ __forceinline__ void find(const ExchangeParams& p, int64_t row) {
        const int64_t flat = p.first_row + row;
        token = token_of(flat, p.view.heads);
        head = static_cast<int>(flat - token * p.view.heads);
        o = p.source.row(token, head);
    }
    __device__ __forceinline__ void load(const ExchangeParams& p, const Wire& wire) {
        sum = p.source.divisor(token, head);
        words.load(p.source, o, wire, 0, sum);
        lse = p.source.lse_of_row(token, head, p.lse_in_two, sum);
    }
};

// One warp pushes every `step`-th row of this rank's partial from `row` on; `current` is the first.
__device__ __forceinline__ void push_rows(const ExchangeParams& p, const Epoch& e, const SlotTable& slots,
                                          PartialRow& current, int64_t row, int64_t step, uint32_t fault) {
    const ExchangeView& v = p.view;
    const Wire wire(v.wire_dtype);
    const int lane = threadIdx.x % 32;
    const int words = static_cast<int>(row_words(p.source.dim, v.wire_dtype)) - kRowHead;
#pragma unroll 1
    for (; row < p.rows; row += step) {
        PartialRow next;
        if (row + step < p.rows) next.find(p, row + step), next.load(p, wire);
        const int64_t at = kHeaderWords + row * (words + kRowHead);
        int begin = 0, end = v.world;
        if (v.mode != kOneShot) {
            begin = SlotTable::place_of(owner_of(current.head, v.heads, v.world), v.rank, v.world);
            end = begin + 1;
        }
        const float2 lse = current.lse;
        const uint64_t first_word = packet(__float_as_uint(lse.x), e.number);
        const uint64_t rest = packet(second_word(lse, fault), e.number);
        // An empty partial's o goes as zeros, whatever it is.
        const uint32_t mask = lse.x == -infinity() ? 0 : 0xffffffffu;
#pragma unroll 1
        for (int first = 0; first < words; first += kWordsAPass) {
            if (first > 0) current.words.load(p.source, current.o, wire, first, current.sum);
#pragma unroll 1
            for (int n = begin; n < end; n++) {
                uint64_t* const to = slots.at(e.number, n) + at;
                if (first == 0 && lane == 0) store_words(to, first_word, rest);
#pragma unroll
                for (int pair = 0; pair < kPairs; pair++) {
                    const int word = first + pair * 64 + lane * 2;
                    if (word >= words) continue;
                    store_words(to + kRowHead + word, packet(current.words.data[pair][0] & mask, e.number),
                                packet(current.words.data[pair][1] & mask, e.number));
                }
            }
        }
        current = next;
    }
}

// What needs no other launch: before the dependency wait. A barrier comes before it is used.
__device__ __forceinline__ void prepare(const ExchangeParams& p, ExchangeState& s) {
    const int i = threadIdx.x;
    if (i < p.view.world) {
        const ulonglong2 slots = *reinterpret_cast<const ulonglong2*>(p.view.slots + i * kSlots);
        s.slots.addresses[i][0] = slots.x, s.slots.addresses[i][1] = slots.y;
    }
    if (i == 64) {
        s.step.view = p.view;
    } else if (i == 96) {
        s.step.target = p.target;
        s.step.first_row = p.first_row, s.step.rows = p.rows, s.step.waiting = p.waiting;
    }
    __syncthreads();
    if (i == 96) s.step.count = count_rows(s.step);
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit)
    treeattn_exchange(const __grid_constant__ treeattn::ExchangeParams p) {
    using namespace treeattn;
    __shared__ ExchangeState s;
    const ExchangeView& v = p.view;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * warps + warp;
    const bool has_source = p.source.o != nullptr && !p.is_pushed;
    const bool has_row = has_source && row < p.rows;
    prepare(p, s);
    PartialRow first;
    if (has_row) first.find(p, row);
    dependency_wait();

    // Everything is asked for before the first of it is needed.
    const ulonglong2 state = load_words(v.window + kConsumed);
    if (has_row) first.load(p, Wire(v.wire_dtype));
    const uint64_t noted = has_source ? load_word(v.window + kStepFault) : 0;
    Epoch e(state.x, __shfl_sync(kAllLanes, state.y, 0));
    if (!p.is_pushed && blockIdx.x == gridDim.x - 1 && warp == warps - 1) push_header(v, e, s.slots);
    const uint32_t fault = pack_fault(noted, v.rank);
    if (!p.is_pushed) {
        delay(DelayPoint::kPush, e.number);
        if (has_source && !e.broken) push_rows(p, e, s.slots, first, row, static_cast<int64_t>(gridDim.x) * warps, fault);
    }
    // All of the block have read the epoch, and what was noted.
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fault != 0) end_step_fault(s.step.view, e.parity(), fault, p.is_last);
        end_block(v);
    }
    receive<kAnyWords>(&s.step, e);
}

TREEATTN_ABI(exchange)
