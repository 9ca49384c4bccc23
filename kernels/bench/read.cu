// What the memory of a GPU can do at most: kernels that do nothing but read, and one that writes what is then read.
// Part of the command line's `bench`, not of the library.
//
// Every reader is given `bytes` (a multiple of 4 MiB) from `data` and adds (xor) what it saw to `sink`: the word of every
// 16 bytes that are there for those that load into registers, which must all agree; the first word of each chunk for the
// one that copies.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace {

constexpr int kUnroll = 8;

__device__ __forceinline__ uint4 load(const uint4* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

__device__ __forceinline__ void add(uint32_t* sink, uint32_t x) {
    x = __reduce_xor_sync(0xffffffffu, x);
    if (threadIdx.x % 32 == 0) atomicXor(sink, x);
}

// Reads pieces of kUnroll * blockDim.x words of 16 bytes: the first of each, `step` pieces apart.
__device__ __forceinline__ void read_pieces(const uint4* data, uint64_t first, uint64_t end, uint64_t step, uint32_t* sink) {
    uint32_t sum = 0;
    for (uint64_t piece = first; piece < end; piece += step) {
        const uint4* from = data + piece * kUnroll * blockDim.x + threadIdx.x;
        uint4 x[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; i++) x[i] = load(from + i * blockDim.x);
#pragma unroll
        for (int i = 0; i < kUnroll; i++) sum ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    }
    add(sink, sum);
}

// Pseudo-random numbers between -1 and 1.
__device__ __forceinline__ float number(uint64_t index) {
    uint64_t x = index * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return static_cast<float>(x >> 40) * (1.f / (1 << 23)) - 1.f;
}

}  // namespace

// All blocks side by side: at any time they read one stretch of memory.
extern "C" __global__ void __launch_bounds__(1024) bench_read_together(const uint4* data, uint64_t bytes, uint32_t* sink) {
    read_pieces(data, blockIdx.x, bytes / 16 / (kUnroll * blockDim.x), gridDim.x, sink);
}

// Each block its own part of memory.
extern "C" __global__ void __launch_bounds__(1024) bench_read_apart(const uint4* data, uint64_t bytes, uint32_t* sink) {
    const uint64_t pieces = bytes / 16 / (kUnroll * blockDim.x);
    read_pieces(data, pieces * blockIdx.x / gridDim.x, pieces * (blockIdx.x + 1) / gridDim.x, 1, sink);
}

// One thread a block keeps a ring of `stages` bulk copies of `chunk` bytes in flight. Before sm_90: nothing.
extern "C" __global__ void __launch_bounds__(32) bench_read_bulk(const char* data, uint64_t bytes, uint32_t* sink,
                                                                 uint64_t chunk, uint64_t stages) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) char ring[];
    __shared__ __align__(8) uint64_t full[16];
    if (threadIdx.x != 0) return;
    const auto address = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
    for (uint32_t stage = 0; stage < stages; stage++) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(full + stage)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const uint64_t all = bytes / chunk;
    const uint64_t mine = blockIdx.x < all ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0;
    const auto copy = [&](uint64_t index, uint32_t stage) {
        const uint32_t barrier = address(full + stage), size = static_cast<uint32_t>(chunk);
        const char* from = data + (blockIdx.x + index * gridDim.x) * chunk;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(size) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                address(ring) + stage * size),
            "l"(from), "r"(size), "r"(barrier)
            : "memory");
    };
    for (uint32_t stage = 0; stage < stages && stage < mine; stage++) copy(stage, stage);
    uint32_t stage = 0, parity = 0, sum = 0;
    for (uint64_t index = 0; index < mine; index++) {
        uint32_t done = 0;
        while (done == 0) {
            asm volatile(
                "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(address(full + stage)), "r"(parity)
                : "memory");
        }
        sum ^= *reinterpret_cast<const volatile uint32_t*>(ring + stage * chunk);
        if (index + stages < mine) copy(index + stages, stage);
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    atomicXor(sink, sum);
#endif
}

// Writes random numbers to `words` words of two 16-bit floats: bf16, or f16.
extern "C" __global__ void __launch_bounds__(1024) bench_fill(uint32_t* data, uint64_t words, uint64_t bf16) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) {
        const float low = number(2 * i), high = number(2 * i + 1);
        if (bf16 != 0) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
            data[i] = *reinterpret_cast<const uint32_t*>(&pair);
        } else {
            const __half2 pair = __floats2half2_rn(low, high);
            data[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    }
}
