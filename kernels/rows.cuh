// Where rows lie in memory: a partial that is read, an output that is written. Mirrored by src/partial/rows.rs; abi.cuh
// checks every field. Rows are numbered by (query token, head); strides are bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace treeattn {

// An output: o [token, head, dim] and natural lse [token, head].
struct RowTarget {
    void* o;
    float* lse;             // may be null: not wanted
    int64_t o_stride[3];    // token, head, dim
    int64_t lse_stride[2];  // token, head
    int32_t dtype;          // of o: f32, f16, bf16
    int32_t dim;            // elements of a row

    __device__ __forceinline__ char* row(int64_t token, int64_t head) const {
        return static_cast<char*>(o) + token * o_stride[0] + head * o_stride[1];
    }
    __device__ __forceinline__ float* lse_of(int64_t token, int64_t head) const {
        if (lse == nullptr) return nullptr;
        return reinterpret_cast<float*>(reinterpret_cast<char*>(lse) + token * lse_stride[0] + head * lse_stride[1]);
    }
};

// A partial: normalised o [token, head, dim] and lse [token, head].
struct RowSource {
    const void* o;
    const float* lse;
    int64_t o_stride[3];
    int64_t lse_stride[2];
    int32_t dtype;
    int32_t dim;
    float to_natural;           // 1, or ln 2 where the lse in memory has base 2
    int32_t plus_inf_is_empty;  // 1: an lse of +inf means empty, too

    __device__ __forceinline__ const char* row(int64_t token, int64_t head) const {
        return static_cast<const char*>(o) + token * o_stride[0] + head * o_stride[1];
    }
    __device__ __forceinline__ const char* lse_of(int64_t token, int64_t head) const {
        return reinterpret_cast<const char*>(lse) + token * lse_stride[0] + head * lse_stride[1];
    }
    // What lies in memory, with -inf where +inf says that the partial is empty, and the natural lse of it.
    __device__ __forceinline__ float without_plus(float stored) const {
        const float infinity = __int_as_float(0x7f800000);
        return plus_inf_is_empty && stored == infinity ? -infinity : stored;
    }
    __device__ __forceinline__ float natural(float stored) const { return without_plus(stored) * to_natural; }
    // The same as a float and what that lacks.
    __device__ __forceinline__ float2 natural_in_two(float stored) const {
        const float x = without_plus(stored), high = x * to_natural;
        // Of ln 2 what a float of it lacks.
        const float low = fmaf(x, to_natural, -high) + x * (to_natural == 1.f ? 0.f : -1.904654299957768e-9f);
        return make_float2(high, fabsf(high) < __int_as_float(0x7f800000) ? low : 0.f);
    }
};

}  // namespace treeattn
