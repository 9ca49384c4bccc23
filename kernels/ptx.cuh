// The instructions that C++ has no name for, one thin wrapper each.
#pragma once

#include <stdint.h>

namespace treeattn {

constexpr uint32_t kAllLanes = 0xffffffffu;  // of a warp

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same pointer, which the compiler then knows to be one to shared memory.
template <class T>
__device__ __forceinline__ T* in_shared(T* p) {
    __builtin_assume(__isShared(p));
    return p;
}

// Waits until everything that this launch depends on has finished and is visible.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets launches that depend on this one start. Their dependency_wait() still waits for the end of this one.
__device__ __forceinline__ void dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory, bypassing L1; `bytes` = 0 writes zeros and reads nothing.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The same, with a word on how long L2 is to keep what comes.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, uint32_t bytes, uint64_t l2_policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(bytes), "l"(l2_policy)
                 : "memory");
}
__device__ __forceinline__ void copy_async4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async8(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Two matrices, whose rows lanes 0 to 15 say.
template <bool Transposed>
__device__ __forceinline__ void load_two_matrices(uint32_t& first, uint32_t& second, uint32_t address) {
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(first), "=r"(second)
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(first), "=r"(second)
                     : "r"(address)
                     : "memory");
    }
}

// Shared memory by address. clear_shared writes 16 bytes of zero.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ uint16_t load_shared16(uint32_t address) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return x;
}
// Reads nothing where it is not wanted, and gives 0.
__device__ __forceinline__ uint32_t load_shared_if(uint32_t address, bool wanted) {
    uint32_t x;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.shared.u32 %0, [%1]; }"
                 : "=r"(x)
                 : "r"(address), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t address, uint16_t x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}
__device__ __forceinline__ void clear_shared(uint32_t address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Four of the bytes of x (0 to 3) and y (4 to 7), as the hexadecimal digits of `which` say, the lowest byte's last.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t x, uint32_t y, uint32_t which) {
    return __byte_perm(x, y, which);
}
// The same where `which` is known at run time only, and each of its digits is below 8.
__device__ __forceinline__ uint32_t pick_bytes_by(uint32_t x, uint32_t y, uint32_t which) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(which));
    return r;
}
// x & mask | more, as one instruction: of two numbers known beforehand the compiler makes two.
__device__ __forceinline__ uint32_t take_bits(uint32_t x, uint32_t mask, uint32_t more) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(more));
    return r;
}
// The lower word of high:low >> bits, 0 to 31 of them.
__device__ __forceinline__ uint32_t shift_right(uint32_t low, uint32_t high, uint32_t bits) {
    return __funnelshift_r(low, high, bits);
}
// x * y + z of two bf16 each, rounded once.
__device__ __forceinline__ uint32_t fma_bf16(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}

// x + y, x * y of two f16 each, rounded once.
__device__ __forceinline__ uint32_t add_f16(uint32_t x, uint32_t y) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
__device__ __forceinline__ uint32_t multiply_f16(uint32_t x, uint32_t y) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
// x * y + z of two f16 each, rounded once.
__device__ __forceinline__ uint32_t fma_f16(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
// What the product lacks of x * y.
__device__ __forceinline__ uint32_t rest_f16(uint32_t x, uint32_t y, uint32_t product) {
    uint32_t r;
    asm("{ .reg .b32 less; neg.f16x2 less, %3; fma.rn.f16x2 %0, %1, %2, less; }" : "=r"(r) : "r"(x), "r"(y), "r"(product));
    return r;
}
// The lower or upper two bytes of a word, f8_e4m3, as two f16.
template <bool Upper>
__device__ __forceinline__ uint32_t f16_of_e4m3(uint32_t word) {
#if __CUDA_ARCH__ >= 890
    uint32_t r;
    if constexpr (Upper) {
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(r) : "r"(word));
    } else {
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(r) : "r"(word));
    }
    return r;
#else
    const uint32_t x = pick_bytes(word, 0, Upper ? 0x3424u : 0x1404u);
    // The bits as f16: 2^8 times too small, and 480 where the byte is a NaN.
    const uint32_t r = multiply_f16(x >> 1 & 0x3f803f80u | x & 0x80008000u, 0x5c005c00u);
    const uint32_t odd = (x & 0x7f007f00u) + 0x01000100u & 0x80008000u;
    return r | (odd >> 15) * 0x7fffu;
#endif
}

// 16 and 8 bytes of shared memory.
__device__ __forceinline__ uint4 load_shared_four(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
__device__ __forceinline__ uint2 load_shared_two(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
}

// Transposes an 8 x 8 matrix of 16-bit elements that lies over the warp as multiply's operands do.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Loads a word through L1. The load is volatile: the compiler does not move it to where the value is used.
__device__ __forceinline__ uint32_t load_cached(const void* p) {
    uint32_t x;
    asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// What is read once is the first to leave L2.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t l2_policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(l2_policy));
    return l2_policy;
}
__device__ __forceinline__ uint64_t evict_normal() {
    uint64_t l2_policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(l2_policy));
    return l2_policy;
}

// 16 bytes, past L1.
__device__ __forceinline__ uint4 load_past16(const void* p, uint64_t l2_policy) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p), "l"(l2_policy));
    return x;
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

// d += a b: 16 x 8 += 16 x 16 times 16 x 8.
template <bool Bf16>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (Bf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Adds one to a counter that wraps to 0 at `last`; gives the value before. Orders what this thread has seen and
// written (block barriers included) before it, and what it does next after it.
__device__ __forceinline__ uint32_t count_arrival(uint32_t* counter, uint32_t last) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}

// Loads and stores of words that other GPUs or the host access while the kernel runs: relaxed, at system scope. A word of 64
// bits is written and read whole. Of two words that are accessed together each is whole, but one may be newer than the other.
__device__ __forceinline__ void store_word(uint64_t* to, uint64_t x) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(x) : "memory");
}
__device__ __forceinline__ void store_words(uint64_t* to, uint64_t x, uint64_t y) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(x), "l"(y) : "memory");
}
__device__ __forceinline__ uint64_t load_word(const uint64_t* from) {
    uint64_t x;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ ulonglong2 load_words(const uint64_t* from) {
    ulonglong2 x;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(x.x), "=l"(x.y) : "l"(from) : "memory");
    return x;
}

// Adds to a word of this GPU, relaxed, without waiting for the result.
__device__ __forceinline__ void add_word(uint64_t* to, uint64_t x) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(x) : "memory");
}

// A clock that is the same on all multiprocessors of a GPU, nanoseconds.
__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

}  // namespace treeattn
