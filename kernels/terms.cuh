// What a step has beside queries, keys and values: windows, what happens to scores, masks, sinks, scales, formats of k and v,
// lists of kv heads. Only kernels whose shape has kTerms know of it; they take TermsParams, of which DecodeParams are the
// beginning, and find the rest by terms_of.
#pragma once

#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "visibility.cuh"

namespace treeattn {

// Of a kernel that takes TermsParams.
__device__ __forceinline__ const Terms& terms_of(const DecodeParams& p) {
    return reinterpret_cast<const TermsParams&>(p).terms;
}

// Whether global positions hide keys.
__device__ __forceinline__ bool hides_by_position(const DecodeParams& p) {
    return is_causal(p) || terms_of(p).window > 0;
}
// Whether they matter: to what is hidden, or to scores.
__device__ __forceinline__ bool needs_positions(const DecodeParams& p) {
    return hides_by_position(p) || terms_of(p).slopes != nullptr;
}

// The number of a query head, at any stride.
__device__ __forceinline__ float head_value(const void* values, int64_t stride, int64_t head) {
    return *reinterpret_cast<const float*>(static_cast<const char*>(values) + head * stride);
}

// The first slot that some query token of a sequence can see, and the one after the last; x <= y. Explicit positions are in
// any order: all slots then.
struct SlotRange {
    int begin, end;
};
static __device__ __noinline__ SlotRange visible_slots(const DecodeParams& p, int b, int first_token, int tokens,
                                                       int keys) {
    if (!hides_by_position(p) || p.placement == kExplicit || tokens <= 0 || keys == 0) return SlotRange{0, keys};
    int64_t first = position_of(p, b, first_token, tokens, 0), last = first + tokens - 1;
    if (p.query_position != nullptr) {
        last = first;
#pragma unroll 1
        for (int i = 1; i < tokens; i++) {
            const int64_t position = p.query_position[first_token + i];
            first = min(first, position), last = max(last, position);
        }
    }
    const int64_t zero = 0, all = keys;
    const int window = terms_of(p).window;
    int64_t begin = zero, end = all;
    if (window > 0) begin = min(max(slots_up_to(p, b, first - window), zero), all);
    if (is_causal(p)) end = min(max(slots_up_to(p, b, last), zero), all);
    return SlotRange{static_cast<int>(begin), static_cast<int>(max(begin, end))};
}

// Bytes of an element.
__device__ __forceinline__ int mask_size(const Terms& t) {
    return t.mask_element == kMaskF32 ? 4 : t.mask_element == kMaskF16 ? 2 : 1;
}

// Whether the mask has an element for each of `keys` slots and `tokens` query tokens of a sequence.
static __device__ __noinline__ bool mask_reaches(const DecodeParams& p, int b, int tokens, int keys) {
    const Terms& t = terms_of(p);
    // Strides are at least 0; a product beyond 63 bits is beyond any buffer.
    const int64_t last[4] = {b, p.q_heads - 1, tokens - 1, keys - 1};
    uint64_t room = t.mask_bytes;
    const uint64_t size = mask_size(t);
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
    int low;           // the first slot that is seen, or (explicit placement) the first position
    int high;          // the last one
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
        RowTerms r = {nullptr, INT32_MIN, INT32_MAX, 0, 0.f, 0.f, -infinity()};
        if (row < live) {
            const int packed = item.row_tile * S::kRows + row;
            const int token = item.tokens == 1 ? 0 : packed / p.group;
            const int64_t head = static_cast<int64_t>(item.head) * p.group + packed - token * p.group;
            if (needs_positions(p)) {
                const int64_t position = position_of(p, item.b, item.first_token, item.tokens, token);
                const int64_t zero = 0, most = INT32_MAX, before = position - t.window;
                const int64_t start = p.placement == kContiguous ? start_of(p, item.b) : 0;
                r.position = static_cast<int>(position - start);
                if (p.placement == kExplicit) {
                    if (is_causal(p)) r.high = static_cast<int>(position);
                    if (t.window > 0) r.low = static_cast<int>(before + 1);
                } else {
                    if (is_causal(p)) {
                        r.high = static_cast<int>(min(max(slots_up_to(p, item.b, position), zero), most)) - 1;
                    }
                    if (t.window > 0) r.low = static_cast<int>(min(max(slots_up_to(p, item.b, before), zero), most));
                }
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
    return (any & 15) == 0 && t.mask_stride[3] == mask_size(t);
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
