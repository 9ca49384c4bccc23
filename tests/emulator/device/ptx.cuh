// kernels/ptx.cuh for the host: the same names, without PTX.
#pragma once

#include "builtins.h"
#include "cuda_fp16.h"

namespace treeattn {

constexpr uint32_t kAllLanes = 0xffffffffu;  // of a warp

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
template <class T>
inline T* in_shared(T* p) {
    return p;
}
inline void dependency_wait() { emulator::dependency_wait(); }
inline void dependency_launch() { emulator::dependency_launch(); }

// Exact up to the last bits, where the GPU is not; numbers too small for a normal float are 0.
inline float exp2_approx(float x) {
    if (fabsf(x) < 1.17549435e-38f) return 1.f;
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}

inline void copy_async16(uint32_t to, const void* from, uint32_t bytes) { emulator::copy_async(to, from, bytes, 16); }
inline void copy_async16(uint32_t to, const void* from, uint32_t bytes, uint64_t) { copy_async16(to, from, bytes); }
inline uint64_t evict_first() { return 0; }
inline uint64_t evict_normal() { return 0; }
inline void copy_async4(uint32_t to, const void* from) { emulator::copy_async(to, from, 4, 4); }
inline void copy_async8(uint32_t to, const void* from) { emulator::copy_async(to, from, 8, 8); }
inline void copy_async_commit() { emulator::copy_commit(); }
template <int Pending>
inline void copy_async_wait() {
    emulator::copy_wait(Pending);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { emulator::load_matrices(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { emulator::load_matrices(r, address, true); }
template <bool Transposed>
inline void load_two_matrices(uint32_t& first, uint32_t& second, uint32_t address) {
    uint32_t r[4];
    // Lanes 16 to 31 name the rows of matrices that nobody takes: those of the first two again.
    address = __shfl_sync(0xffffffffu, address, threadIdx.x % 16);
    emulator::load_matrices(r, address, Transposed);
    first = r[0], second = r[1];
}

inline uint32_t load_shared(uint32_t address) {
    return *reinterpret_cast<const uint32_t*>(emulator::shared_pointer(address));
}
inline uint32_t load_shared_if(uint32_t address, bool wanted) { return wanted ? load_shared(address) : 0; }
inline uint16_t load_shared16(uint32_t address) {
    return *reinterpret_cast<const uint16_t*>(emulator::shared_pointer(address));
}
inline void store_shared(uint32_t address, uint32_t x) {
    *reinterpret_cast<uint32_t*>(emulator::shared_pointer(address)) = x;
}
inline void store_shared16(uint32_t address, uint16_t x) {
    *reinterpret_cast<uint16_t*>(emulator::shared_pointer(address)) = x;
}
inline void clear_shared(uint32_t address) { memset(emulator::shared_pointer(address), 0, 16); }

inline uint32_t pick_bytes(uint32_t x, uint32_t y, uint32_t which) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= static_cast<uint32_t>(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
inline uint32_t pick_bytes_by(uint32_t x, uint32_t y, uint32_t which) { return pick_bytes(x, y, which); }
inline uint32_t take_bits(uint32_t x, uint32_t mask, uint32_t more) { return x & mask | more; }
inline uint32_t shift_right(uint32_t low, uint32_t high, uint32_t bits) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
// What the kernels ask for is exact, so that it does not matter where it is rounded.
inline uint32_t fma_bf16(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto value = [i](uint32_t bits) { return __uint_as_float(bits >> i << 16); };
        const float sum = fmaf(value(x), value(y), value(z));
        r |= (sum != sum ? 0x7fffu : __float_as_uint(sum) >> 16) << i;
    }
    return r;
}

// Exact where the kernels ask for them, as above.
template <class Change>
inline uint32_t change_f16(uint32_t x, uint32_t y, Change change) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto value = [i](uint32_t bits) { return __half2float({static_cast<uint16_t>(bits >> i)}); };
        r |= static_cast<uint32_t>(__float2half_rn(change(value(x), value(y))).bits) << i;
    }
    return r;
}
inline uint32_t add_f16(uint32_t x, uint32_t y) {
    return change_f16(x, y, [](float a, float b) { return a + b; });
}
inline uint32_t multiply_f16(uint32_t x, uint32_t y) {
    return change_f16(x, y, [](float a, float b) { return a * b; });
}
// Rounded twice, once to a float.
inline uint32_t fma_f16(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto value = [i](uint32_t bits) { return __half2float({static_cast<uint16_t>(bits >> i)}); };
        r |= static_cast<uint32_t>(__float2half_rn(fmaf(value(x), value(y), value(z))).bits) << i;
    }
    return r;
}
inline uint32_t rest_f16(uint32_t x, uint32_t y, uint32_t product) { return fma_f16(x, y, product ^ 0x80008000u); }
template <bool Upper>
inline uint32_t f16_of_e4m3(uint32_t word) {
    uint32_t r = 0;
    for (int i = 0; i < 2; i++) {
        const int code = word >> (i + (Upper ? 2 : 0)) * 8 & 0xff, exponent = code >> 3 & 15, mantissa = code & 7;
        float x = exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
        if ((code & 0x7f) == 0x7f) x = NAN;
        r |= static_cast<uint32_t>(__float2half_rn(code & 0x80 ? -x : x).bits) << 16 * i;
    }
    return r;
}
inline uint4 load_shared_four(uint32_t address) {
    return *reinterpret_cast<const uint4*>(emulator::shared_pointer(address));
}
inline uint2 load_shared_two(uint32_t address) {
    return *reinterpret_cast<const uint2*>(emulator::shared_pointer(address));
}

inline uint32_t transpose(uint32_t x) { return emulator::transpose(x); }
inline uint32_t load_cached(const void* p) { return *static_cast<const uint32_t*>(p); }
inline uint4 load_past16(const void* p, uint64_t) { return *static_cast<const uint4*>(p); }
inline void prefetch(const void*) {}

template <bool Bf16>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply(d, a, b0, b1, Bf16);
}

inline uint32_t count_arrival(uint32_t* counter, uint32_t last) {
    emulator::fence();
    return emulator::change(counter, [last](uint32_t old) { return old >= last ? 0 : old + 1; });
}

// Words that others write meanwhile. Who looks for one lets them.
inline void store_word(uint64_t* to, uint64_t x) { emulator::store_later(to, x); }
inline void store_words(uint64_t* to, uint64_t x, uint64_t y) {
    store_word(to, x);
    store_word(to + 1, y);
}
inline uint64_t load_word(const uint64_t* from) {
    return emulator::load_watched(from);
}
inline ulonglong2 load_words(const uint64_t* from) {
    const uint64_t x = emulator::load_watched(from);
    return {x, emulator::load_watched(from + 1)};
}
inline void add_word(uint64_t* to, uint64_t x) {
    emulator::change(to, [x](uint64_t old) { return old + x; });
}
inline uint64_t nanoseconds() { return emulator::global_timer(); }

}  // namespace treeattn
