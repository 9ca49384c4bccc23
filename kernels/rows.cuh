// Where rows lie in memory: a partial that is read, an output that is written. Mirrored by src/partial/rows.rs; abi.cuh
// checks every field. Rows are numbered by (query token, head); strides are bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "abi.cuh"

namespace treeattn {

// An output: o [token, head, dim] and natural lse [token, head].
struct RowTarget {
    void* o;
    float* lse;             // may be null: not wanted
    int64_t o_stride[3];    // token, head, dim
    int64_t lse_stride[2];  // token, head
    int32_t dtype;          // of o: f32, f16, bf16
    int32_t dim;            // elements of a row
    float from_natural;     // what makes a natural lse one of the base that is wanted: 1, or 1 / ln 2
    int32_t reserved;

    __device__ __forceinline__ char* row(int64_t token, int64_t head) const {
        return static_cast<char*>(o) + token * o_stride[0] + head * o_stride[1];
    }
    __device__ __forceinline__ float* lse_of(int64_t token, int64_t head) const {
        if (lse == nullptr) return nullptr;
        return reinterpret_cast<float*>(reinterpret_cast<char*>(lse) + token * lse_stride[0] + head * lse_stride[1]);
    }
};

// A partial: o [token, head, dim] and lse [token, head].
struct RowSource {
    const void* o;
    const float* lse;
    int64_t o_stride[3];
    int64_t lse_stride[2];
    int32_t dtype;
    int32_t dim;
    float to_natural;   // 1, or ln 2 where the lse in memory has base 2
    uint32_t empties;   // what means empty beside an lse of -inf: kPlusInfIsEmpty, kNanIsEmpty
    const float* sum;   // [token, head], or null where o is normalised. Else o is sum_j exp(s_j - m) v_j with m what lies in the
                        // place of the lse, and this sum_j exp(s_j - m)
    int64_t sum_stride[2];
    const int32_t* query_start;  // [batch + 1] the first token of each sequence; null: sequences have tokens_each
    const int32_t* kv_length;    // [batch] sequences without keys have 0 or less; null: all have some
    int32_t batch;               // sequences; tokens behind the last are of none. Counts where one of the two is given
    int32_t tokens_each;

    __device__ __forceinline__ const char* row(int64_t token, int64_t head) const {
        return static_cast<const char*>(o) + token * o_stride[0] + head * o_stride[1];
    }
    __device__ __forceinline__ const char* lse_of(int64_t token, int64_t head) const {
        return reinterpret_cast<const char*>(lse) + token * lse_stride[0] + head * lse_stride[1];
    }
    __device__ __forceinline__ const char* sum_at(int64_t token, int64_t head) const {
        return reinterpret_cast<const char*>(sum) + token * sum_stride[0] + head * sum_stride[1];
    }
    // By what o is still to be divided.
    __device__ __forceinline__ float divisor(int64_t token, int64_t head) const {
        return sum == nullptr ? 1.f : *reinterpret_cast<const float*>(sum_at(token, head));
    }
    // Whether a token is of a sequence without keys, or of none. By a whole warp.
    __device__ __forceinline__ bool is_padding(int64_t token) const {
        if (query_start == nullptr && kv_length == nullptr) return false;
        int sequence = 0;
        if (query_start == nullptr) {
            sequence = static_cast<int>(token / max(tokens_each, 1));
        } else {
            // How many sequences end at or before it; the starts ascend.
            for (int first = 0; first < batch; first += 32) {
                const int i = first + static_cast<int>(threadIdx.x % 32);
                sequence += __popc(__ballot_sync(0xffffffffu, i < batch && query_start[i + 1] <= token));
            }
            if (token < query_start[0]) return true;
        }
        return sequence >= batch || (kv_length != nullptr && kv_length[sequence] <= 0);
    }
    // What lies in memory, with -inf where something else says that the partial is empty.
    __device__ __forceinline__ float without_others(float stored) const {
        const float infinity = __int_as_float(0x7f800000);
        const bool is_empty = ((empties & kPlusInfIsEmpty) != 0 && stored == infinity) ||
                              ((empties & kNanIsEmpty) != 0 && stored != stored);
        return is_empty ? -infinity : stored;
    }
    // The natural lse as a float and what that lacks.
    __device__ __forceinline__ float2 natural_in_two(float stored) const {
        const float x = without_others(stored), high = x * to_natural;
        // Of ln 2 what a float of it lacks.
        const float low = fmaf(x, to_natural, -high) + x * (to_natural == 1.f ? 0.f : -1.904654299957768e-9f);
        return make_float2(high, fabsf(high) < __int_as_float(0x7f800000) ? low : 0.f);
    }
    // The natural lse of a row in two floats, -inf where it is empty. `in_two`: so it lies in memory. `total`: the row's sum, where
    // there are sums. By a whole warp.
    __device__ __forceinline__ float2 lse_of_row(int64_t token, int64_t head, bool in_two, float total) const {
        const float* stored = reinterpret_cast<const float*>(lse_of(token, head));
        float2 found;
        if (sum != nullptr) {
            found = natural_of_sum(stored[0], total);
        } else {
            found = in_two ? make_float2(stored[0], stored[1]) : natural_in_two(stored[0]);
        }
        return is_padding(token) ? make_float2(-__int_as_float(0x7f800000), 0.f) : found;
    }
    // The same of a maximum and a sum.
    __device__ __forceinline__ float2 natural_of_sum(float stored, float total) const {
        const float infinity = __int_as_float(0x7f800000), x = without_others(stored);
        if (x == -infinity) return make_float2(x, 0.f);
        const double lse = x * (to_natural == 1.f ? 1.0 : 0.69314718055994530942) + log(static_cast<double>(total));
        const float high = static_cast<float>(lse);
        return make_float2(high, fabsf(high) < infinity ? static_cast<float>(lse - high) : 0.f);
    }
};

}  // namespace treeattn
