// The kernels of tests/gpu/kernels.ptx and their like, which have no source in CUDA C++.
#include "device/builtins.h"

// Lets dependents start at once, waits, then copies n 16-byte words.
static void late_copy(const uint64_t from, const uint64_t to, const uint64_t n, const uint64_t cycles) {
    emulator::dependency_launch();
    const uint64_t begin = emulator::clock_cycles();
    while (emulator::clock_cycles() - begin < cycles) {
    }
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
}
EMULATOR_KERNEL(late_copy)

// Writes one word.
static void write_to(const uint64_t where) { *reinterpret_cast<volatile uint32_t*>(where) = 1; }
EMULATOR_KERNEL(write_to)
