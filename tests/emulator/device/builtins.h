// What CUDA's compiler knows by itself, for the host's compiler. Included before every kernel source.
#pragma once

#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../engine.h"

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// Kernels are found by these words (build.sh).
#ifndef EMULATOR_LIST
#define __global__
#endif

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::current->block->grid->threads)
#define gridDim (emulator::current->block->grid->blocks)
#define warpSize 32

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(16) longlong2 {
    long long x, y;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;
using std::isinf;
using std::isnan;

namespace emulator {
template <class To, class From>
inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
}  // namespace emulator
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }

inline unsigned long __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }

// --- blocks ---

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_and(int predicate) {
    emulator::current->block->votes_and &= predicate != 0;
    emulator::barrier();
    return emulator::current->block->result_and;
}
inline int __syncthreads_or(int predicate) {
    emulator::current->block->votes_or |= predicate != 0;
    emulator::barrier();
    return emulator::current->block->result_or;
}
inline int __syncthreads_count(int predicate) {
    emulator::current->block->votes_count += predicate != 0;
    emulator::barrier();
    return emulator::current->block->result_count;
}

// --- warps ---

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulator::meet(emulator::Meeting::sync, mask, [](emulator::Warp&) {});
}

namespace emulator {
template <class T>
inline T shuffle(unsigned mask, T x, unsigned source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    Warp* warp = current->warp;
    const unsigned lane = current->lane;
    uint64_t word = 0;
    memcpy(&word, &x, sizeof x);
    warp->in[lane] = word;
    warp->source[lane] = static_cast<uint8_t>(source);
    meet(Meeting::shuffle, mask, [mask](Warp& w) {
        for (unsigned i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            if (!(mask >> w.source[i] & 1)) fail("shuffle: lane %u reads lane %u, which takes no part", i, w.source[i]);
            w.out[i] = w.in[w.source[i]];
        }
    });
    memcpy(&x, &warp->out[lane], sizeof x);
    return x;
}
inline unsigned vote(unsigned mask, bool predicate) {
    Warp* warp = current->warp;
    const unsigned lane = current->lane;
    warp->in[lane] = predicate;
    meet(Meeting::ballot, mask, [mask](Warp& w) {
        unsigned all = 0;
        for (unsigned i = 0; i < 32; i++) all |= (mask >> i & 1) && w.in[i] ? 1u << i : 0;
        for (unsigned i = 0; i < 32; i++) {
            if (mask >> i & 1) w.out[i] = all;
        }
    });
    return static_cast<unsigned>(warp->out[lane]);
}
}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    const unsigned lane = emulator::current->lane, low = lane & ~(static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, x, low + (static_cast<unsigned>(from) & (static_cast<unsigned>(width) - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
    const unsigned lane = emulator::current->lane, high = lane | (static_cast<unsigned>(width) - 1);
    const unsigned from = lane ^ static_cast<unsigned>(lanes);
    return emulator::shuffle(mask, x, from <= high ? from : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const unsigned lane = emulator::current->lane, low = lane & ~(static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, x, lane >= low + by ? lane - by : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const unsigned lane = emulator::current->lane, high = lane | (static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, x, lane + by <= high ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0) == mask; }
inline unsigned __activemask() { return emulator::current->warp->live; }

// --- memory: one order for all but emulator::store_later, with other threads in between ---

inline void __threadfence_block() { emulator::maybe_yield(); }
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_system() { __threadfence(); }

template <class T>
inline T __ldg(const T* p) { return *p; }
template <class T>
inline T __ldcg(const T* p) { return *p; }
template <class T>
inline T __ldcs(const T* p) { return *p; }
template <class T>
inline T __ldcv(const T* p) { return *p; }
template <class T>
inline void __stcg(T* p, T x) { *p = x; }
template <class T>
inline void __stcs(T* p, T x) { *p = x; }
template <class T>
inline void __stwt(T* p, T x) { *p = x; }

namespace emulator {
// Changes a word in one step; gives what it was.
template <class T, class Change>
inline T change(T* p, Change next) {
    maybe_yield();
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    static_assert(sizeof(T) == sizeof(Word));
    auto* word = reinterpret_cast<Word*>(p);
    Word before = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(word, &before, bits<Word>(static_cast<T>(next(bits<T>(before)))), false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    maybe_yield();
    return bits<T>(before);
}
}  // namespace emulator
template <class T, class U>
inline T atomicAdd(T* p, U x) {
    return emulator::change(p, [x](T old) { return old + static_cast<T>(x); });
}
template <class T, class U>
inline T atomicSub(T* p, U x) {
    return emulator::change(p, [x](T old) { return old - static_cast<T>(x); });
}
template <class T, class U>
inline T atomicMax(T* p, U x) {
    return emulator::change(p, [x](T old) { return max(old, static_cast<T>(x)); });
}
template <class T, class U>
inline T atomicMin(T* p, U x) {
    return emulator::change(p, [x](T old) { return min(old, static_cast<T>(x)); });
}
template <class T, class U>
inline T atomicOr(T* p, U x) {
    return emulator::change(p, [x](T old) { return old | static_cast<T>(x); });
}
template <class T, class U>
inline T atomicAnd(T* p, U x) {
    return emulator::change(p, [x](T old) { return old & static_cast<T>(x); });
}
template <class T, class U>
inline T atomicExch(T* p, U x) {
    return emulator::change(p, [x](T) { return static_cast<T>(x); });
}
template <class T, class U, class V>
inline T atomicCAS(T* p, U expected, V x) {
    return emulator::change(p, [=](T old) { return old == static_cast<T>(expected) ? static_cast<T>(x) : old; });
}

inline void __nanosleep(unsigned) { emulator::poll("nanosleep"); }
inline long long clock64() { return static_cast<long long>(emulator::clock_cycles()); }

// --- how the driver finds kernels and constants ---

namespace emulator {
template <auto Function>
struct Registration;
template <class... Arguments, void (*Function)(Arguments...)>
struct Registration<Function> {
    explicit Registration(const char* name) {
        auto* kernel = new Kernel{name, &call, {}};
        (kernel->sizes.push_back(sizeof(std::remove_const_t<Arguments>)), ...);
        kernels().push_back(kernel);
    }
    static void call(const char* arguments) { spread(arguments, std::index_sequence_for<Arguments...>()); }
    // Arguments lie one after the other, each at a multiple of 16.
    template <size_t... I>
    static void spread(const char* arguments, std::index_sequence<I...>) {
        Function(*reinterpret_cast<const Arguments*>(arguments + offset(I))...);
    }
    static constexpr size_t offset(size_t n) {
        constexpr size_t sizes[] = {sizeof(Arguments)..., 0};
        size_t at = 0;
        for (size_t i = 0; i < n; i++) at += (sizes[i] + 15) / 16 * 16;
        return at;
    }
};
struct ConstantRegistration {
    ConstantRegistration(const char* name, const void* data, size_t bytes) {
        constants().push_back({name, const_cast<void*>(data), bytes});
    }
};
}  // namespace emulator
#define EMULATOR_KERNEL(NAME) static const emulator::Registration<&NAME> emulator_kernel_##NAME(#NAME);
#define EMULATOR_CONSTANT(NAME) \
    static const emulator::ConstantRegistration emulator_constant_##NAME(#NAME, &NAME, sizeof NAME);
