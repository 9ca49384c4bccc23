// Element types: 16-bit pairs, splits into exact 16-bit terms, loads and stores by run-time code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "format.cuh"
#include "params.cuh"

namespace treeattn {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
// Where neighbouring floats are half a unit apart: a product of this size is rounded by up to a quarter.
constexpr float kCoarse = 4194304.f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Adds to a sum of two floats, of which the second is what the first lacks.
__device__ __forceinline__ void add_to(float2& sum, float x) {
    const float whole = sum.x + x, part = whole - sum.x;
    sum.y += (sum.x - (whole - part)) + (x - part);
    sum.x = whole;
}

// What a maximum is before there is a key: less than every score, and a number, so that nothing has to be asked for where it is
// subtracted.
constexpr float kNoMaximum = -3.402823466e38f;

// 2^x of a whole number x up to 127, without rounding; 0 below -126, and where there is no number.
__device__ __forceinline__ float power_of_two(float x) {
    // The last bits of a float of this size count ones.
    constexpr float kOnes = 12582912.f;
    return __uint_as_float(__float_as_uint(fmaxf(x, -127.f) + (kOnes + 127.f)) << 23);
}

// m ln 2 + ln l as a float and what that lacks.
__device__ __forceinline__ float2 natural_lse(float m, float l) {
    constexpr float kLn2Low = -1.904654299957768e-9f;  // of ln 2 what kLn2 lacks
    if (!(l < infinity())) return make_float2(l, 0.f);
    // l is 2^n times a number from 2/3 to 4/3, whose logarithm is small, and so is that one's error. l is no subnormal.
    const int bits = __float_as_int(l), n = (bits - 0x3f2aaaab) >> 23;
    const float x = __int_as_float(bits - n * (1 << 23)) - 1.f, s = x * x;
    float2 power = make_float2(m, 0.f);
    add_to(power, static_cast<float>(n));
    float rest = fmaf(fmaf(fmaf(-0.130310059f, s, -0.121484190f), s, -0.166846052f), s, -0.249996200f);
    rest = fmaf(fmaf(fmaf(0.140869141f, s, 0.139814854f), s, 0.200120345f), x, rest);
    rest = fmaf(fmaf(fmaf(rest, x, 0.333331972f), x, -0.5f), s, x);
    float2 sum = make_float2(power.x * kLn2, 0.f);
    sum.y = fmaf(power.x, kLn2, -sum.x) + fmaf(power.x, kLn2Low, power.y * kLn2);
    add_to(sum, rest);
    const float high = sum.x + sum.y;
    return make_float2(high, sum.y - (high - sum.x));
}

template <bool Bf16>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
    if constexpr (Bf16) {
        return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&bits));
    }
}

// Rounds to nearest even.
template <bool Bf16>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    if constexpr (Bf16) {
        __nv_bfloat162 r = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t*>(&r);
    } else {
        __half2 r = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t*>(&r);
    }
}

// What is finite, as a 16-bit type has it: what is beyond its range becomes its largest.
template <bool Bf16>
__device__ __forceinline__ float within_range(float x) {
    const float most = Bf16 ? __int_as_float(0x7f7f0000) : 65504.f, size = fabsf(x);
    return size > most && size < infinity() ? copysignf(most, x) : x;
}

// Whether one of the two 16-bit numbers is an infinity or a NaN.
__device__ __forceinline__ bool pair_not_finite(uint32_t bits, bool bf16) {
    const uint32_t exponent = bf16 ? 0x7f80u : 0x7c00u;
    return (bits & exponent) == exponent || (bits >> 16 & exponent) == exponent;
}

__device__ __forceinline__ float load_element(const void* p, int32_t dtype) {
    if (dtype == kF32) return *static_cast<const float*>(p);
    const uint32_t bits = *static_cast<const uint16_t*>(p);
    return dtype == kBf16 ? unpack_pair<true>(bits).x : unpack_pair<false>(bits).x;
}

__device__ __forceinline__ void store_element(void* p, int32_t dtype, float x) {
    if (dtype == kF32) {
        *static_cast<float*>(p) = x;
    } else {
        const uint32_t bits = dtype == kBf16 ? pack_pair<true>(x, x) : pack_pair<false>(x, x);
        *static_cast<uint16_t*>(p) = static_cast<uint16_t>(bits);
    }
}

// Two neighbours along the head dimension.
__device__ __forceinline__ void store_two(char* p, int64_t stride, int32_t dtype, float2 x) {
    const int size = element_bytes(dtype);
    const bool packed = stride == size && (reinterpret_cast<uintptr_t>(p) & (2 * size - 1)) == 0;
    if (packed && dtype == kF32) {
        *reinterpret_cast<float2*>(p) = x;
    } else if (packed) {
        *reinterpret_cast<uint32_t*>(p) = dtype == kBf16 ? pack_pair<true>(x.x, x.y) : pack_pair<false>(x.x, x.y);
    } else {
        store_element(p, dtype, x.x);
        store_element(p + stride, dtype, x.y);
    }
}

// Two neighbours along the head dimension, of which `there` exist; zeros for the others.
__device__ __forceinline__ float2 load_two(const char* p, int64_t stride, int32_t dtype, int there) {
    const int size = element_bytes(dtype);
    if (there >= 2 && stride == size && (reinterpret_cast<uintptr_t>(p) & (2 * size - 1)) == 0) {
        if (dtype == kF32) return *reinterpret_cast<const float2*>(p);
        const uint32_t bits = *reinterpret_cast<const uint32_t*>(p);
        return dtype == kBf16 ? unpack_pair<true>(bits) : unpack_pair<false>(bits);
    }
    return make_float2(there >= 1 ? load_element(p, dtype) : 0.f, there >= 2 ? load_element(p + stride, dtype) : 0.f);
}

// Eight neighbours along the head dimension.
__device__ __forceinline__ void load_eight(float (&x)[8], const char* p, int64_t stride, int32_t dtype) {
    const int size = element_bytes(dtype);
    if (stride == size && (reinterpret_cast<uintptr_t>(p) & 15) == 0) {
        if (dtype == kF32) {
            const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
            x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        } else {
            const uint4 a = *reinterpret_cast<const uint4*>(p);
            const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = dtype == kBf16 ? unpack_pair<true>(w[i]) : unpack_pair<false>(w[i]);
                x[2 * i] = f.x, x[2 * i + 1] = f.y;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = load_element(p + i * stride, dtype);
    }
}

}  // namespace treeattn
