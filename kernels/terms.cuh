// What a step has beside queries, keys and values: windows, what happens to scores, masks, sinks, scales, formats of k and v,
// lists of kv heads. Only kernels whose shape has kTerms know of it; they take TermsParams, of which DecodeParams are the
// beginning, and find the rest by terms_of.
#pragma once

#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "visibility.cuh"

namespace treeattn {

// The number of a query head, at any stride.
__device__ __forceinline__ float head_value(const void* values, int64_t stride, int64_t head) {
    return *reinterpret_cast<const float*>(static_cast<const char*>(values) + head * stride);
}

// Whether the mask has an element for each of `keys` slots and `tokens` query tokens of a sequence.
static __device__ __noinline__ bool mask_reaches(const DecodeParams& p, int b, int tokens, int keys) {
    const Terms& t = terms_of(p);
    // Strides are at least 0; a product beyond 63 bits is beyond any buffer.
    const int64_t last[4] = {b, p.q_heads - 1, tokens - 1, keys - 1};
    uint64_t room = t.mask_bytes;
    const uint64_t size = mask_element_bytes(t.mask_element);
    if (t.mask == nullptr || room < size) return false;
    room -= size;
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        const uint64_t stride = t.mask_stride[i], n = last[i];
        if (n != 0 && stride > room / n) return false;
        room -= stride * n;
    }
    return true;
}

// What a packed row of an item needs, in shared memory. Rows of the tile past the last valid one hide no key.
struct alignas(16) RowTerms {
    const char* mask;  // the element of slot 0; null: none
    Visible seen;
    int position;      // of the query token; contiguous placement: less that of slot 0
    float slope;       // in log2 units
    float factor;      // of the mask, in log2 units
    float sink;        // -inf: none
};
struct alignas(16) ItemTerms {
    const int32_t* positions;  // explicit placement: where that of slot 0 is said
};

template <int Rows>
struct TermsBlock {
    ItemTerms item;
    RowTerms rows[Rows];
};

// Writes what an item's rows need, one warp a row, one lane of it. `Rows` of the tile, `live` of them there.
template <class S, class I>
__device__ __forceinline__ void stage_terms_of(const DecodeParams& p, const I& item, char* shared, int live) {
    auto& block = *reinterpret_cast<TermsBlock<S::kRows>*>(shared + S::kTermsAt);
    if (threadIdx.x % 32 != 0) return;
    const Terms& t = terms_of(p);
    if (threadIdx.x == 0) {
        ItemTerms it;
        it.positions = p.kv_position == nullptr
                           ? nullptr
                           : p.kv_position + item.b * p.kv_position_stride + item.head * t.kv_position_head_stride;
        block.item = it;
    }
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < S::kRows; row += S::kWarps) {
        RowTerms r = {nullptr, kAllVisible, 0, 0.f, 0.f, -infinity()};
        if (row < live) {
            const int packed = item.row_tile * S::kRows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            if (needs_positions<true>(p)) {
                const int64_t position = position_of(p, item.b, item.first_token, item.tokens, token);
                r.position = static_cast<int>(position - (p.placement == kContiguous ? start_of(p, item.b) : 0));
                r.seen = visible_to(p, item.b, position);
            }
            if (t.slopes != nullptr) r.slope = head_value(t.slopes, t.slope_stride, head) * kLog2E;
            if (t.sinks != nullptr) r.sink = head_value(t.sinks, t.sink_stride, head);
            if (t.mask_element != kMaskNone && t.mask != nullptr) {
                r.mask = static_cast<const char*>(t.mask) + item.b * t.mask_stride[0] + head * t.mask_stride[1] +
                         token * t.mask_stride[2];
                r.factor = t.mask_factor == nullptr ? kLog2E : head_value(t.mask_factor, t.factor_stride, head) * kLog2E;
            }
        }
        block.rows[row] = r;
    }
}

// Whether tiles bring their mask elements with them (Walk::copy_mask): where those of a row lie side by side, and begin at
// multiples of 16 bytes.
__device__ __forceinline__ bool mask_is_staged(const Terms& t) {
    if (t.mask == nullptr || t.mask_element == kMaskNone) return false;
    const int64_t any = reinterpret_cast<int64_t>(t.mask) | t.mask_stride[0] | t.mask_stride[1] | t.mask_stride[2];
    return (any & 15) == 0 && t.mask_stride[3] == mask_element_bytes(t.mask_element);
}

// Merges the partial (0, sink) into that of a row, m in log2 units: gives what its sums are to be multiplied by. The
// difference of the two is taken as a sum of two floats: a sink may be far larger than the scores, by which errors are
// measured.
__device__ __forceinline__ float add_sink(float sink, float& m, float& l) {
    constexpr float kMost = 3.402823466e38f, kLog2ELow = 1.925963033500011e-8f;  // of log2 e what kLog2E lacks
    if (sink == -infinity()) return 1.f;
    const bool is_usual = fabsf(sink) < 1e38f;
    const float high = fminf(fmaxf(sink * kLog2E, -kMost), kMost);
    const float low = is_usual ? fmaf(sink, kLog2E, -high) + sink * kLog2ELow : 0.f;
    float weight = 0.f;
    if (l == 0.f) {
        m = high, l = 1.f;
    } else {
        const float apart = m - high, part = apart - m;
        const float rest = ((m - (apart - part)) - (high + part)) - low;
        if (apart <= 0.f) {
            weight = exp2_approx(apart);
            weight = fmaf(weight, rest * kLn2, weight);
            l = fmaf(l, weight, 1.f);
            m = high;
        } else {
            const float other = exp2_approx(-apart);
            weight = 1.f;
            l += fmaf(other, -rest * kLn2, other);
        }
    }
    if (!(fabsf(sink) < infinity())) l = not_a_number();
    return weight;
}

}  // namespace treeattn
