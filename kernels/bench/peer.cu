// What two GPUs can do for each other at most: a flag to and fro, and an exchange of words that carry their own flags.
// Part of the command line, not of the library. Every wait ends by itself, so that writes that never come are found out.
#include <stdint.h>

namespace {

constexpr uint64_t kTimeout = 1000000000;  // ns

__device__ __forceinline__ uint64_t now() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

__device__ __forceinline__ void put(uint32_t* to, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t get(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

}  // namespace

// `turns` times a flag to the peer and one back; the second rank answers the first. `seen` receives the turns that were seen.
extern "C" __global__ void bench_flag(const uint32_t* mine, uint32_t* peers, uint64_t first, uint64_t turns, uint32_t* seen) {
    const uint64_t until = now() + kTimeout;
    uint32_t turn = 0;
    while (turn < turns) {
        if (first) put(peers, turn + 1);
        uint32_t looks = 0;
        while (get(mine) != turn + 1) {
            if (++looks % 1024 == 0 && now() > until) {
                *seen = turn;
                return;
            }
        }
        turn++;
        if (!first) put(peers, turn);
    }
    *seen = turn;
}

// Sends `count` words to the peer, each beside the number of the exchange, and adds what comes from it: one of two halves of
// `inbox` and of the peer's, in turn. `state` holds the number of the exchange before, then the words that did not come.
extern "C" __global__ void __launch_bounds__(512)
    bench_words(const uint32_t* from, float* sum, const uint64_t* inbox, uint64_t* peers, uint64_t count, uint32_t* state) {
    const uint32_t number = *reinterpret_cast<volatile uint32_t*>(state) + 1;
    const uint64_t half = number % 2 ? count : 0, step = uint64_t{gridDim.x} * blockDim.x;
    const uint64_t begin = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (uint64_t i = begin; i < count; i += step) {
        const uint64_t word = uint64_t{number} << 32 | from[i];
        asm volatile("st.volatile.global.u64 [%0], %1;" ::"l"(peers + half + i), "l"(word) : "memory");
    }
    uint64_t until = 0;
    for (uint64_t i = begin; i < count; i += step) {
        uint64_t word;
        uint32_t looks = 0;
        do {
            asm volatile("ld.volatile.global.u64 %0, [%1];" : "=l"(word) : "l"(inbox + half + i) : "memory");
            if (++looks % 4096 == 0) {
                until = until ? until : now() + kTimeout;
                if (now() > until) {
                    atomicAdd(state + 1, 1);
                    return;
                }
            }
        } while (static_cast<uint32_t>(word >> 32) != number);
        sum[i] = __uint_as_float(from[i]) + __uint_as_float(static_cast<uint32_t>(word));
    }
}

// Counts an exchange.
extern "C" __global__ void bench_counted(uint32_t* state) { *state += 1; }
