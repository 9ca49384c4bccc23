// As much of CUDA's header as the kernels use.
#pragma once

#include "builtins.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
inline __half __float2half_rn(float x) {
    if (x != x) return {0x7fff};
    return {emulator::bits<uint16_t>(static_cast<_Float16>(x))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float __half2float(__half x) { return static_cast<float>(emulator::bits<_Float16>(x.bits)); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
