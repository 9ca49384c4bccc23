// What merges of ranks' rows have in common: the step, a row's words and where it is written, weights.
//
// Every rank merges in rank order by the same arithmetic (the largest log-sum-exp first, then a left fold), and takes its own
// partial from its own window as well, through the wire's type like the others. So all ranks that merge a row hold the same
// bits.
#pragma once

#include "ll.cuh"
#include "numbers.cuh"

namespace treeattn {

constexpr int kWordsAPass = 128;   // of a row's o that a warp holds at a time: 4 words a lane
constexpr int kPairs = kWordsAPass / 64;
constexpr int kAnyWords = 1 << 20; // of a row's o: any number

// What merging needs to know of a step; in shared memory, so that nothing of it has to be waited for.
struct MergeStep {
    ExchangeView view;
    RowTarget target;  // [token, own head, dim]
    int64_t first_row;
    int64_t rows;      // of the launch
    int64_t count;     // of them, those of this rank
    int32_t waiting;   // how many blocks, the last of the grid, may wait for ranks that have not come
    int32_t ticket;    // of the block, see receive
};

// Delays for tests of the protocol, up to TREEATTN_DELAYS nanoseconds; nothing in other builds.
enum class DelayPoint : uint32_t { kPush = 1, kWait = 2, kConsume = 3 };
__device__ __forceinline__ void delay(DelayPoint point, uint32_t epoch) {
#ifdef TREEATTN_DELAYS
    uint32_t x = epoch * 2654435761u ^ blockIdx.x * 40503u ^ threadIdx.x / 32 * 977u ^ static_cast<uint32_t>(point) << 20;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    // Most come at once, so that the others are late.
    if (x % 4 != 0) return;
    const uint64_t until = nanoseconds() + (x >> 2) % TREEATTN_DELAYS;
    while (nanoseconds() < until) {
    }
#endif
}

// Two elements as words of o on the wire, and back. For f32 a word is one element, else two; what is finite stays so.
struct Wire {
    bool is_f32, is_bf16;

    __device__ __forceinline__ explicit Wire(int32_t dtype) : is_f32(dtype == kF32), is_bf16(dtype == kBf16) {}

    __device__ __forceinline__ int elements_a_word() const { return is_f32 ? 1 : 2; }
    __device__ __forceinline__ uint32_t pack(float2 x) const {
        if (is_f32) return __float_as_uint(x.x);
        return is_bf16 ? pack_pair<true>(within_range<true>(x.x), within_range<true>(x.y))
                       : pack_pair<false>(within_range<false>(x.x), within_range<false>(x.y));
    }
    __device__ __forceinline__ float2 unpack(uint32_t bits) const {
        if (is_f32) return make_float2(__uint_as_float(bits), 0.f);
        return is_bf16 ? unpack_pair<true>(bits) : unpack_pair<false>(bits);
    }
};

// The token of flat row x. Wide divisions are a call and a hundred instructions.
__device__ __forceinline__ int64_t token_of(int64_t x, int heads) {
    return x >> 32 == 0 ? static_cast<uint32_t>(x) / static_cast<uint32_t>(heads) : x / heads;
}

// A row of the output. `row` counts from the launch's first.
struct OutputRow {
    char* o;
    float* lse;

    __device__ __forceinline__ OutputRow(const MergeStep& m, int64_t row) {
        const int64_t flat = m.first_row + row, token = token_of(flat, m.view.heads);
        const int64_t head = flat - token * m.view.heads - m.view.first_head;
        o = m.target.row(token, head);
        lse = m.target.lse_of(token, head);
    }
};

// Writes two neighbouring elements of an output row, as many as there are.
__device__ __forceinline__ void write_elements(const RowTarget& target, const OutputRow& to, int d, float2 x) {
    char* at = to.o + d * target.o_stride[2];
    if (d + 1 < target.dim) {
        store_two(at, target.o_stride[2], target.dtype, x);
    } else if (d < target.dim) {
        store_element(at, target.dtype, x.x);
    }
}

// Writes the elements of two neighbouring words of o.
__device__ __forceinline__ void write_words(const RowTarget& target, const Wire& wire, const OutputRow& to, int n, float2 a,
                                            float2 b) {
    if (wire.is_f32) {
        write_elements(target, to, n, make_float2(a.x, b.x));
    } else {
        write_elements(target, to, n * 2, a);
        write_elements(target, to, n * 2 + 2, b);
    }
}

// One warp writes NaN.
static __device__ __noinline__ void poison_row(const MergeStep* step, int64_t row) {
    const MergeStep& m = *step;
    const OutputRow to(m, row);
    for (int d = threadIdx.x % 32; d < m.target.dim; d += 32) {
        store_element(to.o + d * m.target.o_stride[2], m.target.dtype, not_a_number());
    }
    if (to.lse != nullptr && threadIdx.x % 32 == 0) *to.lse = not_a_number();
}

// Tells the host of bad data of some rank. One thread.
__device__ __forceinline__ void report_bad_data(const ExchangeView& v, int parity, uint32_t fault) {
    if (fault != 0) report_status(v, parity, unpack_fault(fault));
}

// Of two words of bad data, that of the first sequence; 0 is none.
__device__ __forceinline__ uint32_t first_fault(uint32_t a, uint32_t b) { return min(a - 1, b - 1) + 1; }

// exp(x) for x <= 0, to a unit in the last place; 0 below the normal floats. exp in fp64 takes several times as long, on
// the way of every row.
__device__ __forceinline__ float weight_of(float x) {
    const float bounded = fmaxf(x, -200.f), n = rintf(bounded * kLog2E);
    const float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, bounded));
    float y = 1.37805939e-3f;
    y = fmaf(y, r, 8.37312452e-3f);
    y = fmaf(y, r, 4.16695364e-2f);
    y = fmaf(y, r, 1.66664720e-1f);
    y = fmaf(y, r, 4.99999851e-1f);
    y = fmaf(y, r, 1.f);
    y = fmaf(y, r, 1.f);
    // y lies between 0.7 and 1.42.
    return n < -125.f ? 0.f : __int_as_float(__float_as_int(y) + (static_cast<int>(n) << 23));
}

// The sum of a row's weights, as a float and what that lacks.
struct WeightSum {
    float high, low;

    __device__ __forceinline__ void add(float x) {
        const float sum = high + x, part = sum - high;
        low += (high - (sum - part)) + (x - part);
        high = sum;
    }
};

// What follows from the log-sum-exps of a row.
struct RowScale {
    float2 top;      // the largest
    bool bad;        // one is not a number, or +inf
    WeightSum sum;   // of the weights of all ranks
    float inverse, rest;  // of the sum, as a float and what that lacks

    // A rank's weight before it is divided by the sum; 0 where it is empty. Its o is zero then.
    __device__ __forceinline__ float weight(float2 lse) const {
        return lse.x == -infinity() ? 0.f : weight_of((lse.x - top.x) + (lse.y - top.y));
    }
    __device__ __forceinline__ void invert() {
        if (top.x == -infinity()) sum.high = 1.f;
        inverse = __fdividef(1.f, sum.high);
        rest = inverse * fmaf(-sum.low, inverse, fmaf(-sum.high, inverse, 1.f));
        if (bad) inverse = not_a_number();
    }
    // The weight by which o is multiplied; not a number where the row is bad.
    __device__ __forceinline__ float share(float weight) const { return fmaf(weight, inverse, weight * rest); }
    // The merged lse as a float and what that lacks, for merges to come.
    __device__ __forceinline__ float2 lse_in_two() const {
        if (bad) return make_float2(not_a_number(), 0.f);
        const double x = static_cast<double>(top.x) + top.y + log(static_cast<double>(sum.high) + sum.low);
        const float first = static_cast<float>(x);
        return make_float2(first, first == -infinity() ? 0.f : static_cast<float>(x - first));
    }
    // The merged lse.
    __device__ __forceinline__ float lse() const {
        return bad ? not_a_number() : top.x + (top.y + fmaf(sum.low, inverse, logf(sum.high)));
    }
};

}  // namespace treeattn
